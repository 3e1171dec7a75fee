/* Processors: which one a thread runs on, how it makes way for the peers that run there too, and how much cache they have.
 *
 * May live here: questions and wishes to the system, of the calling thread. May not: rings, who the peers are, when to ask.
 *
 * Whoever is woken often starts on the processor of who woke it, on virtual machines above all, where one that is idle counts as taken by
 * others. Two ranks that sleep and wake each other then stay together while a processor beside them idles: neither runs long enough for
 * the balancer of the kernel to see two that want to run. A thread can send itself away, and that is all there is: its affinity without
 * the processors in question, and the old affinity back.
 */
#ifndef RT_PLACE_H
#define RT_PLACE_H

#include <stdio.h>

enum { RT_CACHE_BYTES = 32 << 20 }; /* where the system does not say */

/* Bytes of the third level of cache that one processor shares with some. Not by sysconf: in a virtual machine it gave ten times as much. */
static long rt_cache_bytes(void)
{
    long kilobytes = 0;
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re");
    if (file) {
        if (fscanf(file, "%ldK", &kilobytes) != 1)
            kilobytes = 0;
        fclose(file);
    }
    return kilobytes > 0 ? kilobytes << 10 : RT_CACHE_BYTES;
}

#ifdef __linux__
#include <sched.h>

typedef cpu_set_t rt_processors;

static int rt_processor(void) { return sched_getcpu(); }

static void rt_processors_none(rt_processors *set) { CPU_ZERO(set); }

static void rt_processors_add(rt_processors *set, int processor)
{
    if (processor >= 0 && processor < CPU_SETSIZE)
        CPU_SET(processor, set);
}

/* Moves the calling thread off these processors; it stays where it is if it may run on no others. */
static void rt_leave_processors(const rt_processors *taken)
{
    cpu_set_t allowed, free;
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return; /* a machine with more processors than the set can name */
    CPU_AND(&free, &allowed, taken);
    CPU_XOR(&free, &free, &allowed);
    if (CPU_COUNT(&free) && sched_setaffinity(0, sizeof free, &free) == 0)
        sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
typedef int rt_processors;

static int rt_processor(void) { return -1; }
static void rt_processors_none(rt_processors *set) { *set = 0; }
static void rt_processors_add(rt_processors *set, int processor) { (void)set, (void)processor; }
static void rt_leave_processors(const rt_processors *taken) { (void)taken; }
#endif
#endif
