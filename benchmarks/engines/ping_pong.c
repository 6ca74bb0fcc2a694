// How long what one core wrote takes to be seen by another, in nanoseconds: two threads, each held on a core of its own,
// answer each other through one line of the cache. The least of several batches, for whatever else happens adds to it.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

enum { BATCHES = 10, ANSWERS = 300, WARM = 50 };
static _Atomic int line __attribute__((aligned(128)));

static void hold(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

static void *answer(void *core) {
    hold(*(int *)core);  // both cores are the caller's: Python takes them from those that it may run on
    for (int turn = 1; turn < 2 * (WARM + BATCHES * ANSWERS); turn += 2) {
        while (atomic_load_explicit(&line, memory_order_acquire) != turn) {}
        atomic_store_explicit(&line, turn + 1, memory_order_release);
    }
    return 0;
}

static double now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e9 + time.tv_nsec;
}

// One way, in nanoseconds, between two cores that the process may run on; below 0: no thread could be had. The calling
// thread may run afterwards where it might before.
double distance_ns(int here, int there) {
    cpu_set_t before;
    pthread_t other;
    double least = 1e18, began = 0;
    pthread_getaffinity_np(pthread_self(), sizeof before, &before);
    atomic_store(&line, 0);
    if (pthread_create(&other, 0, answer, &there)) return -1;
    hold(here);
    for (int count = 0; count < WARM + BATCHES * ANSWERS; count++) {
        if (count >= WARM && (count - WARM) % ANSWERS == 0) began = now_ns();
        atomic_store_explicit(&line, 2 * count + 1, memory_order_release);
        while (atomic_load_explicit(&line, memory_order_acquire) != 2 * count + 2) {}
        if (count >= WARM && (count - WARM) % ANSWERS == ANSWERS - 1) {
            double passed = (now_ns() - began) / (2.0 * ANSWERS);
            if (passed < least) least = passed;
        }
    }
    pthread_join(other, 0);
    pthread_setaffinity_np(pthread_self(), sizeof before, &before);
    return least;
}
