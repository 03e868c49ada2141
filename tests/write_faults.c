/* Counts, logs and spoils the calls by which a process writes below one folder.

   cc -shared -fPIC -O1 -o write_faults.so write_faults.c -ldl; preload it (LD_PRELOAD), then call
   faults_arm(folder, at, error, for_ever, log): the call number `at` (from 1) fails with `error`, and all
   that follow it if `for_ever`; error -1 kills the process instead (SIGKILL). `log` is a file descriptor
   that gets a line per call, or -1. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static size_t below_len = 0;
static long at = -1, calls = 0;
static int error = 0, for_ever = 0, out = -1;

void faults_arm(const char *folder, long at_, int error_, int for_ever_, int log) {
    strncpy(below, folder, sizeof below - 1);
    below_len = strlen(below); at = at_; error = error_; for_ever = for_ever_; out = log; calls = 0;
}
long faults_count(void) { return calls; }

#define REAL(name) ({ static __typeof__(&name) f; if (!f) f = (__typeof__(&name))dlsym(RTLD_NEXT, #name); f; })

static int is_below(const char *path) { return path && !strncmp(path, below, below_len); }

static const char *whole(int dir, const char *path, char *room) {
    if (!path || path[0] == '/') return path;
    char link[64], base[PATH_MAX]; ssize_t n;
    if (dir == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    if ((n = readlink(link, base, sizeof base - 1)) < 0) return path;
    base[n] = 0;
    snprintf(room, PATH_MAX, "%s/%s", base, path);
    return room;
}

/* 1: this call shall fail. `takes_room`: a full disk stops it, too. */
static int strikes(const char *what, const char *path, const char *to, int takes_room) {
    if (!below_len || !(is_below(path) || is_below(to))) return 0;
    calls++;
    if (out >= 0) {
        char line[3*PATH_MAX];
        int n = snprintf(line, sizeof line, "%s\t%s\t%s\n", what, path ? path : "", to ? to : "");
        syscall(SYS_write, out, line, n);
    }
    if (!error || calls < at || (calls > at && !for_ever)) return 0;
    if (error == -1) { kill(getpid(), SIGKILL); pause(); }
    if ((error == ENOSPC) && !takes_room) return 0;
    errno = error;
    return 1;
}

static int strikes_fd(const char *what, int fd, int takes_room) {
    if (!below_len) return 0;
    char link[64], path[PATH_MAX]; ssize_t n; int was = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    n = readlink(link, path, sizeof path - 1);
    errno = was;
    if (n < 0) return 0;
    path[n] = 0;
    return strikes(what, path, 0, takes_room);
}

#define WRITES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))

#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list a; va_start(a, flags); int mode = va_arg(a, int); va_end(a); char room[PATH_MAX]; \
    if (WRITES(flags) && strikes("open", whole(AT_FDCWD, path, room), 0, flags & O_CREAT)) return -1; \
    return REAL(name)(path, flags, mode); }
OPEN(open) OPEN(open64)

#define OPENAT(name) int name(int dir, const char *path, int flags, ...) { \
    va_list a; va_start(a, flags); int mode = va_arg(a, int); va_end(a); char room[PATH_MAX]; \
    if (WRITES(flags) && strikes("open", whole(dir, path, room), 0, flags & O_CREAT)) return -1; \
    return REAL(name)(dir, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) FILE *name(const char *path, const char *mode) { char room[PATH_MAX]; \
    if (strpbrk(mode, "wa+") && strikes("open", whole(AT_FDCWD, path, room), 0, 1)) return 0; \
    return REAL(name)(path, mode); }
FOPEN(fopen) FOPEN(fopen64)

#define FAIL(type, name, args, pass, what, fd, room, ret) \
    type name args { if (strikes_fd(what, fd, room)) return ret; return REAL(name) pass; }
FAIL(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n), "write", fd, 1, -1)
FAIL(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), "write", fd, 1, -1)
FAIL(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), "write", fd, 1, -1)
FAIL(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), "write", fd, 1, -1)
FAIL(size_t, fwrite, (const void *b, size_t s, size_t n, FILE *f), (b, s, n, f), "write", fileno(f), 1, 0)
FAIL(int, fsync, (int fd), (fd), "fsync", fd, 1, -1)
FAIL(int, fdatasync, (int fd), (fd), "fsync", fd, 1, -1)
FAIL(int, ftruncate, (int fd, off_t n), (fd, n), "truncate", fd, 1, -1)
FAIL(int, ftruncate64, (int fd, off64_t n), (fd, n), "truncate", fd, 1, -1)

#define PATH(type, name, args, pass, what, path, to, takes_room) type name args { char r1[PATH_MAX], r2[PATH_MAX]; (void)r2; \
    return strikes(what, path, to, takes_room) ? -1 : REAL(name) pass; }
PATH(int, mkdir, (const char *p, mode_t m), (p, m), "mkdir", whole(AT_FDCWD, p, r1), 0, 1)
PATH(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), "mkdir", whole(d, p, r1), 0, 1)
PATH(int, rename, (const char *p, const char *q), (p, q), "rename", whole(AT_FDCWD, p, r1), whole(AT_FDCWD, q, r2), 1)
PATH(int, renameat, (int d, const char *p, int e, const char *q), (d, p, e, q), "rename", whole(d, p, r1), whole(e, q, r2), 1)
PATH(int, unlink, (const char *p), (p), "unlink", whole(AT_FDCWD, p, r1), 0, 0)
PATH(int, unlinkat, (int d, const char *p, int f), (d, p, f), "unlink", whole(d, p, r1), 0, 0)
PATH(int, rmdir, (const char *p), (p), "unlink", whole(AT_FDCWD, p, r1), 0, 0)
