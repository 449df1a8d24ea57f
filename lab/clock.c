/* clock_gettime(2) without the system call, for processes inside lab/uml: that kernel has no vDSO, and QEMU reads the clock some
 * fifteen times for every byte of QMP that it is sent (libvirt sends 40 KiB at a QEMU's start). Between two system calls of a
 * thread, at most WINDOW_NS apart, the CPU's counter tells how much later it is. Preloaded by /etc/ld.so.preload over there. */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define WINDOW_NS 1000000 /* an error of the rate of 1 in 1000 is 1 us within it */
#define CALL_NS 200000    /* more than the system call itself takes */
#define RATE_NS 10000000  /* how long the counter is watched before its rate counts */

struct seen { uint64_t ticks; int64_t ns, told; };
static __thread struct seen seen[8]; /* by clock */
static uint64_t first_ticks;
static int64_t first_ns;
static double ns_per_tick; /* 0: not known yet */

/* The clocks that go on steadily and are not of a process or thread, by bit. */
static const unsigned steady = 1 << CLOCK_REALTIME | 1 << CLOCK_MONOTONIC | 1 << CLOCK_MONOTONIC_RAW | 1 << CLOCK_BOOTTIME;

static void learn(uint64_t ticks, int64_t ns)
{
    if (!first_ns) {
        first_ticks = ticks;
        first_ns = ns;
    } else if (!ns_per_tick && ns - first_ns > RATE_NS && ticks > first_ticks) {
        ns_per_tick = (double)(ns - first_ns) / (double)(ticks - first_ticks);
    }
}

int clock_gettime(clockid_t clock, struct timespec *time)
{
    if ((unsigned)clock > 7 || !(steady >> clock & 1))
        return (int)syscall(SYS_clock_gettime, clock, time);
    struct seen *s = &seen[clock];
    uint64_t ticks = __rdtsc();
    double later = (double)(ticks - s->ticks) * ns_per_tick; /* huge if the counter went back */
    int64_t ns;
    if (s->ns && ns_per_tick && later < WINDOW_NS) {
        ns = s->ns + (int64_t)later;
        if (ns < s->told)
            ns = s->told;
    } else {
        if (syscall(SYS_clock_gettime, clock, time))
            return -1;
        ns = time->tv_sec * 1000000000L + time->tv_nsec;
        s->ticks = __rdtsc();
        /* Somebody else ran in between: nobody knows when the clock was read. */
        s->ns = (double)(s->ticks - ticks) * ns_per_tick < CALL_NS ? ns : 0;
        if (clock == CLOCK_MONOTONIC)
            learn(ticks, ns);
        if (ns < s->told && s->told - ns < WINDOW_NS)
            ns = s->told;
    }
    s->told = ns;
    time->tv_sec = ns / 1000000000;
    time->tv_nsec = ns % 1000000000;
    return 0;
}
