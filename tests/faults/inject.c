// A library for LD_PRELOAD that makes chosen system calls on one folder fail, kill the process, stop it or wait.
//
// It does nothing until fault_arm() is called, through ctypes, or FAULT_ARM is in the environment of a program that
// starts. A call counts if its class is in the mask and its path, or the path of its descriptor, lies below the folder;
// descriptors of memfd_create count too, since the engine may load from them.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// The order is that of CLASSES in inject.py.
enum {
  kOpen,
  kRead,
  kWrite,
  kRename,
  kMkdir,
  kUnlink,
  kStat,
  kFlock,
  kFsync,
  kMmap,
  kMode,
  kList,
  kClose,
  kLink,
};
enum { kFail, kKill, kStop, kDelay, kShort };

static char prefix[PATH_MAX];
static size_t prefix_length;
static unsigned mask;
static int nth, error_number, action, repeat;
static int count, fired;
static long clock_offset;
static int nfs_locks;

void fault_arm(const char* folder, unsigned classes, int n, int error, int what, int again) {
  strncpy(prefix, folder, sizeof(prefix) - 1);
  prefix_length = strlen(prefix);
  nth = n, error_number = error, action = what, repeat = again, count = 0, fired = 0;
  mask = classes;
}

void fault_disarm(void) {
  mask = 0;
  clock_offset = 0;
  nfs_locks = 0;
}

int fault_fired(void) { return fired; }
void fault_clock(long seconds) { clock_offset = seconds; }
void fault_nfs(int on) { nfs_locks = on; }

// FAULT_ARM is "classes:n:error:action:repeat:folder".
__attribute__((constructor)) static void from_environment(void) {
  const char* text = getenv("FAULT_ARM");
  unsigned classes;
  int n, error, what, again, end = 0;
  if (text && sscanf(text, "%u:%d:%d:%d:%d:%n", &classes, &n, &error, &what, &again, &end) == 5 && end) {
    fault_arm(text + end, classes, n, error, what, again);
  }
}

static int below(const char* path) {
  return strncmp(path, prefix, prefix_length) == 0 && (path[prefix_length] == '/' || path[prefix_length] == 0);
}

static int descriptor_below(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof(path) - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return below(path) || strncmp(path, "/memfd:", 7) == 0;
}

static int path_below(int folder, const char* path) {
  if (!path) return folder >= 0 && descriptor_below(folder);
  if (path[0] == '/') return below(path);
  if (folder != AT_FDCWD) return descriptor_below(folder);
  char here[PATH_MAX];
  long length = syscall(SYS_readlinkat, AT_FDCWD, "/proc/self/cwd", here, sizeof(here) - 1);
  if (length <= 0) return 0;
  here[length] = 0;
  return below(here);
}

// Whether this call is to fail, with errno set. A short write is the caller's affair: it asks `shortened`.
static int strike(void) {
  int number = __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
  if (number != nth && !(repeat && number > nth)) return 0;
  fired = 1;
  switch (action) {
    case kKill:
      kill(getpid(), SIGKILL);
      break;
    case kStop:
      kill(getpid(), SIGSTOP);
      break;
    case kDelay: {
      struct timespec wait = {0, 20000000};
      nanosleep(&wait, NULL);
      break;
    }
    case kFail:
      errno = error_number;
      return 1;
  }
  return 0;
}

static int hit_path(int class, int folder, const char* path) {
  if (!(mask >> class & 1)) return 0;
  int kept = errno;
  if (path_below(folder, path) && strike()) return 1;
  errno = kept;
  return 0;
}

static int hit_fd(int class, int fd) {
  if (!(mask >> class & 1)) return 0;
  int kept = errno;
  if (descriptor_below(fd) && strike()) return 1;
  errno = kept;
  return 0;
}

static size_t shortened(int fd, size_t size) {
  if (action != kShort || !(mask >> kWrite & 1) || size < 2 || !descriptor_below(fd)) return size;
  int before = fired;
  fired = 0;
  strike();
  size_t allowed = fired ? size / 2 : size;
  fired |= before;
  return allowed;
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void* real(const char* name) { return dlsym(RTLD_NEXT, name); }

#define OPEN(name)                                  \
  int name(const char* path, int flags, ...) {      \
    va_list more;                                   \
    va_start(more, flags);                          \
    mode_t mode = va_arg(more, mode_t);             \
    va_end(more);                                   \
    if (hit_path(kOpen, AT_FDCWD, path)) return -1; \
    static int (*next)(const char*, int, ...);      \
    if (!next) next = REAL(name);                   \
    return next(path, flags, mode);                 \
  }
#define OPENAT(name)                                       \
  int name(int folder, const char* path, int flags, ...) { \
    va_list more;                                          \
    va_start(more, flags);                                 \
    mode_t mode = va_arg(more, mode_t);                    \
    va_end(more);                                          \
    if (hit_path(kOpen, folder, path)) return -1;          \
    static int (*next)(int, const char*, int, ...);        \
    if (!next) next = REAL(name);                          \
    return next(folder, path, flags, mode);                \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

// One function of the C library: its type, name, parameters, arguments, when it is hit, and what it then returns.
#define WRAP(type, name, parameters, arguments, condition, failure) \
  type name parameters {                                            \
    if (condition) return failure;                                  \
    static __typeof__(&name) next;                                  \
    if (!next) next = REAL(name);                                   \
    return next arguments;                                          \
  }
WRAP(FILE*, fopen, (const char* path, const char* mode), (path, mode), hit_path(kOpen, AT_FDCWD, path), NULL)
WRAP(FILE*, fopen64, (const char* path, const char* mode), (path, mode), hit_path(kOpen, AT_FDCWD, path), NULL)
WRAP(ssize_t, read, (int fd, void* to, size_t n), (fd, to, n), hit_fd(kRead, fd), -1)
WRAP(ssize_t, pread64, (int fd, void* to, size_t n, off64_t at), (fd, to, n, at), hit_fd(kRead, fd), -1)
WRAP(int, rename, (const char* from, const char* to), (from, to), hit_path(kRename, AT_FDCWD, from), -1)
WRAP(int, renameat, (int a, const char* from, int b, const char* to), (a, from, b, to), hit_path(kRename, a, from), -1)
WRAP(int, renameat2, (int a, const char* from, int b, const char* to, unsigned flags), (a, from, b, to, flags),
     hit_path(kRename, a, from), -1)
WRAP(int, mkdir, (const char* path, mode_t mode), (path, mode), hit_path(kMkdir, AT_FDCWD, path), -1)
WRAP(int, mkdirat, (int folder, const char* path, mode_t mode), (folder, path, mode), hit_path(kMkdir, folder, path),
     -1)
WRAP(int, unlink, (const char* path), (path), hit_path(kUnlink, AT_FDCWD, path), -1)
WRAP(int, unlinkat, (int folder, const char* path, int flags), (folder, path, flags), hit_path(kUnlink, folder, path),
     -1)
WRAP(int, rmdir, (const char* path), (path), hit_path(kUnlink, AT_FDCWD, path), -1)
WRAP(int, stat, (const char* path, struct stat* to), (path, to), hit_path(kStat, AT_FDCWD, path), -1)
WRAP(int, stat64, (const char* path, struct stat64* to), (path, to), hit_path(kStat, AT_FDCWD, path), -1)
WRAP(int, lstat, (const char* path, struct stat* to), (path, to), hit_path(kStat, AT_FDCWD, path), -1)
WRAP(int, lstat64, (const char* path, struct stat64* to), (path, to), hit_path(kStat, AT_FDCWD, path), -1)
WRAP(int, fstat, (int fd, struct stat* to), (fd, to), hit_fd(kStat, fd), -1)
WRAP(int, fstat64, (int fd, struct stat64* to), (fd, to), hit_fd(kStat, fd), -1)
WRAP(int, fstatat, (int folder, const char* path, struct stat* to, int flags), (folder, path, to, flags),
     hit_path(kStat, folder, path), -1)
WRAP(int, fstatat64, (int folder, const char* path, struct stat64* to, int flags), (folder, path, to, flags),
     hit_path(kStat, folder, path), -1)
WRAP(int, access, (const char* path, int mode), (path, mode), hit_path(kStat, AT_FDCWD, path), -1)
WRAP(int, faccessat, (int folder, const char* path, int mode, int flags), (folder, path, mode, flags),
     hit_path(kStat, folder, path), -1)
WRAP(int, statvfs64, (const char* path, struct statvfs64* to), (path, to), hit_path(kStat, AT_FDCWD, path), -1)
WRAP(int, fstatvfs64, (int fd, struct statvfs64* to), (fd, to), hit_fd(kStat, fd), -1)
WRAP(int, fsync, (int fd), (fd), hit_fd(kFsync, fd), -1)
WRAP(int, fdatasync, (int fd), (fd), hit_fd(kFsync, fd), -1)
WRAP(void*, mmap, (void* at, size_t n, int protection, int flags, int fd, off_t offset),
     (at, n, protection, flags, fd, offset), fd >= 0 && hit_fd(kMmap, fd), MAP_FAILED)
WRAP(void*, mmap64, (void* at, size_t n, int protection, int flags, int fd, off64_t offset),
     (at, n, protection, flags, fd, offset), fd >= 0 && hit_fd(kMmap, fd), MAP_FAILED)
WRAP(int, chmod, (const char* path, mode_t mode), (path, mode), hit_path(kMode, AT_FDCWD, path), -1)
WRAP(int, fchmod, (int fd, mode_t mode), (fd, mode), hit_fd(kMode, fd), -1)
WRAP(int, fchmodat, (int folder, const char* path, mode_t mode, int flags), (folder, path, mode, flags),
     hit_path(kMode, folder, path), -1)
WRAP(int, utimensat, (int folder, const char* path, const struct timespec times[2], int flags),
     (folder, path, times, flags), hit_path(kMode, folder, path), -1)
WRAP(int, futimens, (int fd, const struct timespec times[2]), (fd, times), hit_fd(kMode, fd), -1)
WRAP(int, ftruncate64, (int fd, off64_t length), (fd, length), hit_fd(kWrite, fd), -1)
WRAP(DIR*, opendir, (const char* path), (path), hit_path(kList, AT_FDCWD, path), NULL)
WRAP(DIR*, fdopendir, (int fd), (fd), hit_fd(kList, fd), NULL)
WRAP(int, link, (const char* from, const char* to), (from, to), hit_path(kLink, AT_FDCWD, to), -1)
WRAP(int, linkat, (int a, const char* from, int b, const char* to, int flags), (a, from, b, to, flags),
     hit_path(kLink, b, to), -1)
WRAP(int, symlink, (const char* from, const char* to), (from, to), hit_path(kLink, AT_FDCWD, to), -1)
WRAP(ssize_t, readlink, (const char* path, char* to, size_t n), (path, to, n), hit_path(kLink, AT_FDCWD, path), -1)
WRAP(ssize_t, readlinkat, (int folder, const char* path, char* to, size_t n), (folder, path, to, n),
     hit_path(kLink, folder, path), -1)
WRAP(int, memfd_create, (const char* name, unsigned flags), (name, flags), (mask >> kOpen & 1) && strike(), -1)

// The file is closed all the same, as Linux does.
int close(int fd) {
  int failed = hit_fd(kClose, fd), kept = errno;
  static int (*next)(int);
  if (!next) next = REAL(close);
  int result = next(fd);
  if (!failed) return result;
  errno = kept;
  return -1;
}

ssize_t write(int fd, const void* from, size_t n) {
  if (action != kShort && hit_fd(kWrite, fd)) return -1;
  static ssize_t (*next)(int, const void*, size_t);
  if (!next) next = REAL(write);
  return next(fd, from, shortened(fd, n));
}

ssize_t pwrite64(int fd, const void* from, size_t n, off64_t at) {
  if (action != kShort && hit_fd(kWrite, fd)) return -1;
  static ssize_t (*next)(int, const void*, size_t, off64_t);
  if (!next) next = REAL(pwrite64);
  return next(fd, from, shortened(fd, n), at);
}

// NFS makes record locks of these: an exclusive one needs a descriptor that can write, a shared one that can read.
int flock(int fd, int operation) {
  if (hit_fd(kFlock, fd)) return -1;
  int mode = fcntl(fd, F_GETFL) & O_ACCMODE;
  if (nfs_locks && descriptor_below(fd) &&
      ((operation & LOCK_EX && mode == O_RDONLY) || (operation & LOCK_SH && mode == O_WRONLY))) {
    errno = EBADF;
    return -1;
  }
  static int (*next)(int, int);
  if (!next) next = REAL(flock);
  return next(fd, operation);
}

int clock_gettime(clockid_t clock, struct timespec* to) {
  static int (*next)(clockid_t, struct timespec*);
  if (!next) next = REAL(clock_gettime);
  int result = next(clock, to);
  if (clock == CLOCK_REALTIME) to->tv_sec += clock_offset;
  return result;
}
