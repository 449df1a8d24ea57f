/* enter --clock: print CLOCK_BOOTTIME in seconds.
 * enter PID CMD…: run CMD in every namespace of PID. What nsenter does, and besides: the command dies with us, signals are
 * passed on, and the environment is a host's and not the caller's. Small because every test pays for it many times. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static pid_t child;

static void pass_on(int sig, siginfo_t *info, void *unused)
{
    (void)unused;
    if (info->si_code <= 0 && child > 0) /* sent by a process; a terminal's signals reach the child by themselves */
        kill(child, sig);
}

static void host_environment(void)
{
    char *term = getenv("TERM"), *columns = getenv("COLUMNS");
    char *t = term ? strdup(term) : 0, *c = columns ? strdup(columns) : 0;
    clearenv();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", "/root", 1);
    setenv("LANG", "C.UTF-8", 1);
    setenv("PYTHONPYCACHEPREFIX", "/var/cache/mcft-pyc", 1);
    if (t) setenv("TERM", t, 1);
    if (c) setenv("COLUMNS", c, 1);
}

int main(int argc, char **argv)
{
    static const int passed[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH};
    struct sigaction a = {.sa_sigaction = pass_on, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigset_t block, old;
    int status;
    if (argc == 2 && !strcmp(argv[1], "--clock")) {
        struct timespec t;
        clock_gettime(CLOCK_BOOTTIME, &t);
        return printf("%ld.%06ld\n", (long)t.tv_sec, t.tv_nsec / 1000) < 0;
    }
    if (argc < 3)
        return 2;
    int fd = syscall(SYS_pidfd_open, atoi(argv[1]), 0);
    if (fd < 0 || setns(fd, CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP)) {
        fprintf(stderr, "lab: cannot enter the host: %s\n", strerror(errno));
        return 125;
    }
    close(fd);
    sigfillset(&block);
    sigprocmask(SIG_BLOCK, &block, &old);
    child = fork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        sigprocmask(SIG_SETMASK, &old, 0);
        host_environment();
        if (chdir("/root"))
            perror("/root");
        execvp(argv[2], argv + 2);
        fprintf(stderr, "lab: %s: %s\n", argv[2], strerror(errno));
        _exit(errno == ENOENT ? 127 : 126);
    }
    for (unsigned i = 0; i < sizeof passed / sizeof *passed; i++)
        sigaction(passed[i], &a, 0);
    sigprocmask(SIG_SETMASK, &old, 0);
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return 125;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
