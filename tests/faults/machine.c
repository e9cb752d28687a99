/* Loaded before libc in a server under test (machine.py): a wall clock that is wrong, and a folder
 * that is read-only.
 *
 * In the folder that ONEWORD_TEST_MACHINE names: `clock`, seconds to add to the time of day, and
 * `read-only`, a link to the folder below which nothing may be written while it is there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static volatile int64_t *offset;
static char order[PATH_MAX];

__attribute__((constructor)) static void begin(void) {
    char path[PATH_MAX];
    const char *folder = getenv("ONEWORD_TEST_MACHINE");
    if (!folder) return;
    snprintf(order, sizeof order, "%s/read-only", folder);
    snprintf(path, sizeof path, "%s/clock", folder);
    int file = REAL(open)(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *mapped = mmap(NULL, 8, PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) offset = mapped;
    close(file);
}

static int64_t ahead(void) { return offset ? *offset : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real) real = REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += ahead();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = REAL(gettimeofday)(now, zone);
    if (!result) now->tv_sec += ahead();
    return result;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}

/* Whether a path, or that of a descriptor, lies where nothing may be written. */
static int refused(const char *path) {
    char folder[PATH_MAX];
    int saved = errno;
    ssize_t length = order[0] ? readlink(order, folder, sizeof folder - 1) : -1;
    errno = saved;
    if (length <= 0 || strncmp(path, folder, length) || (path[length] && path[length] != '/'))
        return 0;
    errno = EROFS;
    return 1;
}

static int refused_file(int file) {
    char name[64], path[PATH_MAX];
    if (!order[0]) return 0;
    int saved = errno;
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = readlink(name, path, sizeof path - 1);
    errno = saved;
    if (length <= 0) return 0;
    path[length] = 0;
    return refused(path);
}

#define OPEN(name)                                                       \
    int name(const char *path, int flags, ...) {                         \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode_t mode = va_arg(rest, mode_t);                              \
        va_end(rest);                                                    \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && refused(path))    \
            return -1;                                                   \
        return REAL(name)(path, flags, mode);                            \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int file, const void *content, size_t size) {
    return refused_file(file) ? -1 : REAL(write)(file, content, size);
}
ssize_t pwrite(int file, const void *content, size_t size, off_t at) {
    return refused_file(file) ? -1 : REAL(pwrite)(file, content, size, at);
}
ssize_t pwrite64(int file, const void *content, size_t size, off64_t at) {
    return refused_file(file) ? -1 : REAL(pwrite64)(file, content, size, at);
}
int ftruncate(int file, off_t size) {
    return refused_file(file) ? -1 : REAL(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) {
    return refused_file(file) ? -1 : REAL(ftruncate64)(file, size);
}
int rename(const char *from, const char *to) {
    return refused(to) ? -1 : REAL(rename)(from, to);
}
int unlink(const char *path) { return refused(path) ? -1 : REAL(unlink)(path); }
int mkdir(const char *path, mode_t mode) { return refused(path) ? -1 : REAL(mkdir)(path, mode); }
