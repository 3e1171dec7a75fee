/* One descriptor that becomes readable when any socket of an engine can make progress.
 *
 * May live here: the thin, portable face of epoll (Linux) and kqueue (macOS), and of a descriptor that wakes a sleeper. May not:
 * anything that knows of frames, works or Python.
 *
 * Sockets are registered once, edge-triggered, for both directions. An event loop or a blocked thread watches only the descriptor of
 * the set, so nothing is armed and disarmed while data flow, and data that nobody wants yet cannot make a level-triggered loop spin.
 */
#ifndef RT_POLL_H
#define RT_POLL_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

enum { RT_POLL_READ = 1, RT_POLL_WRITE = 2, RT_POLL_HUP = 4 };

typedef struct {
    uintptr_t token;
    int flags;
} rt_event;

#ifdef __linux__
#include <sys/epoll.h>
#include <sys/eventfd.h>

static int rt_poll_create(void) { return epoll_create1(EPOLL_CLOEXEC); }

static int rt_poll_add(int set, int fd, uintptr_t token)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data = {.ptr = (void *)token}};
    return epoll_ctl(set, EPOLL_CTL_ADD, fd, &event);
}

static int rt_poll_remove(int set, int fd) { return epoll_ctl(set, EPOLL_CTL_DEL, fd, NULL); }

/* Takes what is ready now; never waits. */
static int rt_poll_take(int set, rt_event *out, int most)
{
    struct epoll_event events[64];
    int count = epoll_wait(set, events, most < 64 ? most : 64, 0);
    for (int i = 0; i < count; i++) {
        uint32_t got = events[i].events;
        out[i].token = (uintptr_t)events[i].data.ptr;
        out[i].flags = ((got & EPOLLIN) ? RT_POLL_READ : 0) | ((got & EPOLLOUT) ? RT_POLL_WRITE : 0) |
                       ((got & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) ? RT_POLL_HUP : 0);
    }
    return count;
}

static int rt_wake_create(int fds[2])
{
    fds[0] = fds[1] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return fds[0] < 0 ? -1 : 0;
}
#else
#include <sys/event.h>

static int rt_poll_create(void)
{
    int set = kqueue();
    if (set >= 0)
        fcntl(set, F_SETFD, FD_CLOEXEC);
    return set;
}

static int rt_poll_add(int set, int fd, uintptr_t token)
{
    struct kevent changes[2];
    EV_SET(&changes[0], fd, EVFILT_READ, EV_ADD | EV_CLEAR, 0, 0, (void *)token);
    EV_SET(&changes[1], fd, EVFILT_WRITE, EV_ADD | EV_CLEAR, 0, 0, (void *)token);
    return kevent(set, changes, 2, NULL, 0, NULL);
}

static int rt_poll_remove(int set, int fd)
{
    struct kevent changes[2];
    EV_SET(&changes[0], fd, EVFILT_READ, EV_DELETE, 0, 0, NULL);
    EV_SET(&changes[1], fd, EVFILT_WRITE, EV_DELETE, 0, 0, NULL);
    return kevent(set, changes, 2, NULL, 0, NULL);
}

static int rt_poll_take(int set, rt_event *out, int most)
{
    struct kevent events[64];
    struct timespec now = {0, 0};
    int count = kevent(set, NULL, 0, events, most < 64 ? most : 64, &now);
    for (int i = 0; i < count; i++) {
        out[i].token = (uintptr_t)events[i].udata;
        out[i].flags = (events[i].filter == EVFILT_READ ? RT_POLL_READ : RT_POLL_WRITE) |
                       ((events[i].flags & (EV_EOF | EV_ERROR)) ? RT_POLL_HUP | RT_POLL_READ : 0);
    }
    return count;
}

static int rt_wake_create(int fds[2])
{
    if (pipe(fds))
        return -1;
    for (int i = 0; i < 2; i++) {
        fcntl(fds[i], F_SETFD, FD_CLOEXEC);
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
    }
    return 0;
}
#endif

/* A full pipe or counter already wakes whoever sleeps on it, so a failed write is success. */
static void rt_wake_signal(int fd)
{
    uint64_t one = 1;
    ssize_t ignored = write(fd, &one, sizeof one);
    (void)ignored;
}

static void rt_wake_drain(int fd)
{
    char buffer[64];
    while (read(fd, buffer, sizeof buffer) == (ssize_t)sizeof buffer) {
    }
}

static double rt_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Sleeps until one of two descriptors is readable: 1; 0 at the end of `seconds` (negative: never ends); -EINTR on a signal. */
static int rt_poll_sleep(int fd_a, int fd_b, double seconds)
{
    struct pollfd fds[2] = {{.fd = fd_a, .events = POLLIN}, {.fd = fd_b, .events = POLLIN}};
    int milliseconds = seconds < 0 ? -1 : seconds > 1e6 ? 1000000000 : (int)(seconds * 1e3 + 0.999);
    int count = poll(fds, 2, milliseconds);
    return count < 0 ? -errno : count > 0;
}
#endif
