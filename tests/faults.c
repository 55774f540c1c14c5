/* Faults of a file system, for tests/faults.py: loaded before the C library by LD_PRELOAD.

   Operations on files below FAULT_FOLDER are counted. FAULT_KIND "count" tells each on the standard
   error; "kill" ends the process before operation FAULT_AT; "EIO" lets this one fail; "ENOSPC" lets
   it and all after it fail that need room. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(const char *path, int needs_room)
{
    static const char *folder, *kind;
    static long at, number;
    if (!folder) {
        if (!(folder = getenv("FAULT_FOLDER")))
            return 0;
        kind = getenv("FAULT_KIND");
        at = atol(getenv("FAULT_AT"));
    }
    if (strncmp(path, folder, strlen(folder)))
        return 0;
    number++;
    if (!strcmp(kind, "count"))
        dprintf(2, "operation %s\n", path);
    else if (!strcmp(kind, "kill") && number == at)
        kill(getpid(), SIGKILL);
    else if (!strcmp(kind, "EIO") && number == at)
        return errno = EIO;
    else if (!strcmp(kind, "ENOSPC") && number >= at && needs_room)
        return errno = ENOSPC;
    return 0;
}

static int handle_fails(int handle, int needs_room)
{
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return fails(path, needs_room);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

#define OPEN(name)                                                       \
    int name(const char *path, int flags, ...)                           \
    {                                                                    \
        REAL(name);                                                      \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode_t mode = va_arg(rest, mode_t);                              \
        va_end(rest);                                                    \
        if (CHANGES(flags) && fails(path, flags & O_CREAT)) return -1;   \
        return real(path, flags, mode);                                  \
    }
OPEN(open)
OPEN(open64)

#define ON_PATH(name, room) int name(const char *path)                   \
    { REAL(name); return fails(path, room) ? -1 : real(path); }
ON_PATH(unlink, 0)
ON_PATH(rmdir, 0)

int mkdir(const char *path, mode_t mode)
{ REAL(mkdir); return fails(path, 1) ? -1 : real(path, mode); }

int rename(const char *from, const char *to)
{ REAL(rename); return fails(to, 0) ? -1 : real(from, to); }

int fsync(int handle)
{ REAL(fsync); return handle_fails(handle, 0) ? -1 : real(handle); }

int ftruncate64(int handle, off64_t size)
{ REAL(ftruncate64); return handle_fails(handle, 1) ? -1 : real(handle, size); }

ssize_t write(int handle, const void *from, size_t size)
{ REAL(write); return handle_fails(handle, 1) ? -1 : real(handle, from, size); }

ssize_t writev(int handle, const struct iovec *from, int count)
{ REAL(writev); return handle_fails(handle, 1) ? -1 : real(handle, from, count); }
