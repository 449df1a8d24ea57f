/* guestd: the one program of the lab's guest. Linked statically, started by guest/init.
 *
 * TCP and UDP 7     echo.
 * UDP to 10.77.0.100:9999   the beacon: a decimal number in ASCII, one more with every datagram, about every
 *                   millisecond, from boot on. It counts datagrams offered, so a hole on the wire is a lost packet.
 * UDP and TCP 9000  control, one command per datagram or line, one answer each (see `answer`).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 1024 /* the writer's file: 4 MiB */
#define DATA "/data/writer.dat"

static volatile uint64_t beacon_n;
static volatile int beacon_us = 1000, beacon_on = 1, dirty_mib;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void nap(long us)
{
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    clock_nanosleep(CLOCK_MONOTONIC, 0, &t, 0);
}

static void thread(void *(*f)(void *), void *arg)
{
    pthread_t t;
    if (!pthread_create(&t, 0, f, arg))
        pthread_detach(t);
}

static int listener(int type, int port)
{
    int one = 1, s = socket(AF_INET, type, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(s, (void *)&a, sizeof a) || (type == SOCK_STREAM && listen(s, 64)))
        printf("guestd: port %d: %s\n", port, strerror(errno));
    return s;
}

/* ---- beacon and memory dirtier ---- */

static void *beacon(void *unused)
{
    (void)unused;
    int s = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9999)};
    inet_pton(AF_INET, "10.77.0.100", &to.sin_addr);
    for (;; nap(beacon_us)) {
        char b[24];
        if (!beacon_on)
            continue;
        int n = sprintf(b, "%llu", (unsigned long long)beacon_n + 1);
        /* A full queue or an unresolved neighbour drops the datagram here; the number is then sent again. */
        if (sendto(s, b, n, MSG_DONTWAIT, (void *)&to, sizeof to) == n)
            beacon_n++;
    }
    return 0;
}

static void *dirtier(void *unused)
{
    (void)unused;
    static char ram[64 << 20];
    size_t at = 0;
    for (unsigned v = 0;; v++, nap(10000))
        for (int i = 0; i < dirty_mib * 256 / 100; i++, at = (at + BLOCK) % sizeof ram)
            *(volatile unsigned *)(ram + at) = v;
    return 0;
}

/* ---- the disk writer: every block says which write made it; what each should hold is kept in RAM ---- */

static struct {
    volatile int run, running, period_us;
    volatile uint64_t n, ok, bad, err;
    volatile double slowest;
    uint32_t holds[BLOCKS];
} w;
static pthread_mutex_t w_lock = PTHREAD_MUTEX_INITIALIZER;

static void fill(uint32_t *b, uint32_t n, int block)
{
    for (int i = 0; i < BLOCK / 4; i++)
        b[i] = n ? n + i * (block + 1) : 0;
}

static int holds(const uint32_t *b, uint32_t n, int block)
{
    for (int i = 0; i < BLOCK / 4; i++)
        if (b[i] != (n ? n + i * (block + 1) : 0))
            return 0;
    return 1;
}

static int open_data(uint32_t **b)
{
    static int made;
    if (posix_memalign((void **)b, BLOCK, BLOCK))
        return -1;
    int fd = open(DATA, O_RDWR | O_CREAT | O_DIRECT, 0644);
    for (int i = 0; fd >= 0 && !made && i < BLOCKS; i++) {
        fill(*b, 0, i);
        if (pwrite(fd, *b, BLOCK, (off_t)i * BLOCK) != BLOCK)
            w.err++;
    }
    if (fd >= 0 && !made++)
        fsync(fd);
    return fd;
}

static void *writer(void *unused)
{
    (void)unused;
    uint32_t *b;
    pthread_mutex_lock(&w_lock);
    int fd = open_data(&b);
    pthread_mutex_unlock(&w_lock);
    while (fd >= 0 && w.run) {
        int k = rand() % BLOCKS, r = rand() % BLOCKS;
        double t = now();
        pthread_mutex_lock(&w_lock);
        fill(b, w.n + 1, k);
        if (pwrite(fd, b, BLOCK, (off_t)k * BLOCK) != BLOCK || fdatasync(fd))
            w.err++;
        else
            w.holds[k] = ++w.n;
        if (now() - t > w.slowest)
            w.slowest = now() - t;
        if (pread(fd, b, BLOCK, (off_t)r * BLOCK) != BLOCK)
            w.err++;
        else if (holds(b, w.holds[r], r))
            w.ok++;
        else
            w.bad++;
        pthread_mutex_unlock(&w_lock);
        nap(w.period_us);
    }
    if (fd < 0)
        w.err++;
    else
        close(fd);
    free(b);
    w.running = 0;
    return 0;
}

static void writer_stop(void)
{
    for (w.run = 0; w.running;)
        nap(1000);
}

/* Every block against what RAM says it should hold, read past the page cache. */
static void writer_check(char *out)
{
    uint32_t *b;
    int good = 0, bad = 0, first = -1;
    pthread_mutex_lock(&w_lock);
    int fd = open_data(&b);
    for (int i = 0; i < BLOCKS; i++)
        if (fd >= 0 && pread(fd, b, BLOCK, (off_t)i * BLOCK) == BLOCK && holds(b, w.holds[i], i))
            good++;
        else if (!bad++)
            first = i;
    close(fd);
    pthread_mutex_unlock(&w_lock);
    free(b);
    sprintf(out, "check good=%d bad=%d first_bad=%d", good, bad, first);
}

static void writer_cmd(const char *arg, char *out)
{
    int ms;
    if (!strncmp(arg, "start", 5) && !w.run && !w.running) {
        w.period_us = sscanf(arg + 5, "%d", &ms) == 1 ? ms * 1000 : 10000;
        w.run = w.running = 1;
        w.slowest = 0;
        thread(writer, 0);
    } else if (!strcmp(arg, "stop"))
        writer_stop();
    else if (!strcmp(arg, "check")) {
        writer_check(out);
        return;
    }
    sprintf(out, "writer run=%d n=%llu ok=%llu bad=%llu err=%llu slowest_ms=%.0f", w.running, (unsigned long long)w.n,
            (unsigned long long)w.ok, (unsigned long long)w.bad, (unsigned long long)w.err, w.slowest * 1e3);
}

/* ---- control ---- */

/* sha256 of the raw device: synced, caches dropped, read past the page cache; the same as sha256sum of a raw image. */
static void disk_sum(const char *dev, char *out)
{
    char path[64];
    int in[2], res[2];
    snprintf(path, sizeof path, "/dev/%s", dev);
    sync();
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
    if (fd < 0 || write(fd, "3", 1) != 1)
        printf("guestd: drop_caches: %s\n", strerror(errno));
    close(fd);
    fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0 || strchr(dev, '/') || pipe2(in, O_CLOEXEC) || pipe2(res, O_CLOEXEC)) {
        sprintf(out, "error no disk %.32s", dev);
        return;
    }
    pid_t p = fork();
    if (!p) {
        dup2(in[0], 0);
        dup2(res[1], 1);
        execl("/bin/busybox", "sha256sum", (char *)0);
        _exit(127);
    }
    close(in[0]), close(res[1]);
    char *b;
    long n = -1;
    if (!posix_memalign((void **)&b, BLOCK, 1 << 20)) {
        while ((n = read(fd, b, 1 << 20)) > 0)
            if (write(in[1], b, n) != n)
                break;
        free(b);
    }
    close(in[1]);
    char sum[65] = "";
    if (read(res[0], sum, 64) != 64 || n)
        sprintf(out, "error reading %s: %s", path, strerror(errno));
    else
        sprintf(out, "%s", sum);
    close(res[0]), close(fd);
    waitpid(p, 0, 0);
}

/* Writes MIB MiB of numbers that grow from SEED on the raw device, past the page cache, each block acknowledged by the disk. */
static void disk_fill(const char *arg, char *out)
{
    char dev[16], path[64];
    unsigned long long seed, mib, done = 0;
    uint64_t *b = 0;
    if (sscanf(arg, "%15[a-z] %llu %llu", dev, &mib, &seed) != 3 || posix_memalign((void **)&b, BLOCK, 1 << 20)) {
        strcpy(out, "error: fill DEV MIB SEED");
        return;
    }
    snprintf(path, sizeof path, "/dev/%s", dev);
    int fd = open(path, O_WRONLY | O_DIRECT | O_SYNC | O_CLOEXEC);
    for (; done < mib; done++) {
        for (int i = 0; i < 1 << 17; i++)
            b[i] = seed * 0x9e3779b97f4a7c15 + (done << 20) + i;
        if (write(fd, b, 1 << 20) != 1 << 20)
            break;
    }
    sprintf(out, "%s %llu MiB", done == mib && !fsync(fd) ? "ok" : "error", done);
    close(fd), free(b);
}

/* A clean end: redis and the writer stop, the disk is unmounted. */
static void leave(int how)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(6379), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval limit = {10, 0};
    char c[64];
    int s = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    writer_stop();
    if (!connect(s, (void *)&a, sizeof a) && write(s, "SHUTDOWN\r\n", 10) == 10)
        while (read(s, c, sizeof c) > 0)
            ;
    sync();
    for (int i = 0; umount("/data") && errno == EBUSY && i < 100; i++)
        nap(20000);
    printf("guestd: leaving\n");
    reboot(how);
}

static void *leave_soon(void *how)
{
    nap(50000); /* let the answer out */
    leave((int)(intptr_t)how);
    return 0;
}

static void answer(char *c, char *out, size_t size)
{
    c[strcspn(c, "\r\n")] = 0;
    if (!strcmp(c, "ping"))
        strcpy(out, "pong");
    else if (!strcmp(c, "sync"))
        sync(), strcpy(out, "ok");
    else if (!strcmp(c, "uptime"))
        sprintf(out, "%.3f", now());
    else if (!strcmp(c, "beacon"))
        sprintf(out, "%llu", (unsigned long long)beacon_n);
    else if (!strcmp(c, "beacon on") || !strcmp(c, "beacon off"))
        beacon_on = c[8] == 'n', strcpy(out, "ok");
    else if (!strncmp(c, "beacon ", 7) && atoi(c + 7) > 0)
        beacon_us = atoi(c + 7), strcpy(out, "ok");
    else if (!strncmp(c, "sum ", 4))
        disk_sum(c + 4, out);
    else if (!strncmp(c, "fill ", 5))
        disk_fill(c + 5, out);
    else if (!strncmp(c, "writer ", 7))
        writer_cmd(c + 7, out);
    else if (!strncmp(c, "dirty ", 6))
        dirty_mib = atoi(c + 6), strcpy(out, "ok");
    else if (!strcmp(c, "reboot") || !strcmp(c, "poweroff"))
        thread(leave_soon, (void *)(intptr_t)(*c == 'r' ? RB_AUTOBOOT : RB_POWER_OFF)), strcpy(out, "ok");
    else if (!strcmp(c, "fsck")) {
        int fd = open("/run/fsck", O_RDONLY);
        long n = read(fd, out, size - 1);
        out[n > 0 ? n : 0] = 0;
        out[strcspn(out, "\n")] = 0;
        close(fd);
    } else
        strcpy(out, "error: ping sync uptime fsck reboot poweroff | sum DEV | fill DEV MIB SEED | dirty MIB_PER_S | beacon [on|off|PERIOD_US] | writer start [MS]|stop|stat|check");
}

struct query { int s; struct sockaddr_in from; char text[256]; };

static void *udp_answer(void *arg)
{
    struct query *q = arg;
    char out[1024];
    answer(q->text, out, sizeof out);
    sendto(q->s, out, strlen(out), 0, (void *)&q->from, sizeof q->from);
    free(q);
    return 0;
}

static void *udp_control(void *unused)
{
    (void)unused;
    int s = listener(SOCK_DGRAM, 9000);
    for (;;) {
        struct query *q = calloc(1, sizeof *q);
        socklen_t l = sizeof q->from;
        q->s = s;
        if (recvfrom(s, q->text, sizeof q->text - 1, 0, (void *)&q->from, &l) < 0)
            free(q);
        else
            thread(udp_answer, q);
    }
    return 0;
}

static void *tcp_control_client(void *arg)
{
    FILE *f = fdopen((int)(intptr_t)arg, "r+");
    char line[256], out[1024];
    while (f && fgets(line, sizeof line, f)) {
        answer(line, out, sizeof out);
        fseek(f, 0, SEEK_CUR);
        fprintf(f, "%s\n", out);
        fflush(f);
    }
    if (f)
        fclose(f);
    return 0;
}

static void *tcp_echo_client(void *arg)
{
    int s = (int)(intptr_t)arg;
    char b[4096];
    for (long n; (n = read(s, b, sizeof b)) > 0 && write(s, b, n) == n;)
        ;
    close(s);
    return 0;
}

static void *tcp_server(void *arg)
{
    int control = arg != 0, s = listener(SOCK_STREAM, control ? 9000 : 7);
    for (;;) {
        int c = accept(s, 0, 0);
        if (c >= 0)
            thread(control ? tcp_control_client : tcp_echo_client, (void *)(intptr_t)c);
    }
    return 0;
}

static void *udp_echo(void *unused)
{
    (void)unused;
    int s = listener(SOCK_DGRAM, 7);
    for (;;) {
        char b[2048];
        struct sockaddr_in from;
        socklen_t l = sizeof from;
        long n = recvfrom(s, b, sizeof b, 0, (void *)&from, &l);
        if (n >= 0)
            sendto(s, b, n, 0, (void *)&from, l);
    }
    return 0;
}

/* `virsh shutdown` presses the ACPI power button. */
static void *power_button(void *unused)
{
    (void)unused;
    struct pollfd p[4];
    struct input_event e;
    int n = 0;
    for (int i = 0; i < 4; i++) {
        char path[32];
        sprintf(path, "/dev/input/event%d", i);
        int fd = open(path, O_RDONLY);
        if (fd >= 0)
            p[n++] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    while (n && poll(p, n, -1) > 0)
        for (int i = 0; i < n; i++)
            if (p[i].revents && read(p[i].fd, &e, sizeof e) == sizeof e && e.type == EV_KEY && e.code == KEY_POWER)
                leave(RB_POWER_OFF);
    return 0;
}

int main(void)
{
    setvbuf(stdout, 0, _IONBF, 0);
    signal(SIGPIPE, SIG_IGN);
    srand(1);
    if (getenv("guest_beacon")) /* from the kernel's command line, by init: one guest's beacon is enough for a LAN */
        beacon_on = 0;
    thread(tcp_server, 0);
    thread(tcp_server, (void *)1);
    thread(udp_echo, 0);
    thread(udp_control, 0);
    thread(dirtier, 0);
    thread(power_button, 0);
    beacon(0);
}
