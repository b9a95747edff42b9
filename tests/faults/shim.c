/* Faults of disk and clock for the programs of a trial (LD_PRELOAD).
 *
 * The file that FAULTS_CONTROL names is mapped by every process; tests/faults/shim.py writes it
 * while they run. An errno that is not 0 fails each `every`th call on a file below `prefix`.
 * `short_writes` halves what a write takes. Every read of the octets from `bad_start` to `bad_end` of
 * files whose paths begin with `bad_prefix` fails with EIO. `clock_nanoseconds` is added to the wall
 * clock, and never to the monotonic one. `hits` counts the calls that were changed. Python calls the
 * names with 64.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
  int64_t clock_nanoseconds;
  int32_t write_errno;
  int32_t sync_errno;
  int32_t read_errno;
  int32_t short_writes;
  uint32_t every;
  uint32_t calls;
  uint32_t hits;
  char prefix[228];
  int64_t bad_start;
  int64_t bad_end;
  char bad_prefix[240];
};

static struct control *control;

__attribute__((constructor)) static void map_control(void) {
  const char *path = getenv("FAULTS_CONTROL");
  int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (mapped != MAP_FAILED) control = mapped;
}

static int below(int file, const char *prefix) {
  char link[64], path[512];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strncmp(path, prefix, strlen(prefix)) == 0;
}

/* Whether this call is one of those to be changed. */
static int chosen(int armed, int file) {
  if (!armed || !below(file, control->prefix)) return 0;
  uint32_t number = __atomic_add_fetch(&control->calls, 1, __ATOMIC_RELAXED);
  if (control->every > 1 && number % control->every) return 0;
  __atomic_add_fetch(&control->hits, 1, __ATOMIC_RELAXED);
  return 1;
}

/* Whether a read meets the bad place. */
static int meets_bad_place(int file, off_t at, size_t size) {
  if (!control || !control->bad_end || at < 0) return 0;
  if (at >= control->bad_end || at + (off_t)size <= control->bad_start) return 0;
  if (!below(file, control->bad_prefix)) return 0;
  __atomic_add_fetch(&control->hits, 1, __ATOMIC_RELAXED);
  return 1;
}

static size_t total(const struct iovec *parts, int count) {
  size_t size = 0;
  while (count-- > 0) size += parts[count].iov_len;
  return size;
}

#define NEXT(name) \
  static __typeof__(name) *next; \
  if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAIL(kind, file) \
  do { \
    int error = control ? control->kind : 0; \
    if (chosen(error, file)) { errno = error; return -1; } \
  } while (0)

#define FAIL_READ(file, at, size) \
  do { \
    FAIL(read_errno, file); \
    if (meets_bad_place(file, at, size)) { errno = EIO; return -1; } \
  } while (0)

int fsync(int file) { NEXT(fsync); FAIL(sync_errno, file); return next(file); }
int fdatasync(int file) { NEXT(fdatasync); FAIL(sync_errno, file); return next(file); }

static size_t taken(int file, size_t size) {
  return control && size > 1 && chosen(control->short_writes, file) ? size / 2 : size;
}

ssize_t write(int file, const void *data, size_t size) {
  NEXT(write);
  FAIL(write_errno, file);
  return next(file, data, taken(file, size));
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
  NEXT(pwrite);
  FAIL(write_errno, file);
  return next(file, data, taken(file, size), at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
  NEXT(pwrite64);
  FAIL(write_errno, file);
  return next(file, data, taken(file, size), at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
  NEXT(writev);
  FAIL(write_errno, file);
  if (count > 1 && control && chosen(control->short_writes, file)) count = 1;
  return next(file, parts, count);
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
  NEXT(pwritev);
  FAIL(write_errno, file);
  if (count > 1 && control && chosen(control->short_writes, file)) count = 1;
  return next(file, parts, count, at);
}
ssize_t pwritev2(int file, const struct iovec *parts, int count, off_t at, int flags) {
  NEXT(pwritev2);
  FAIL(write_errno, file);
  if (count > 1 && control && chosen(control->short_writes, file)) count = 1;
  return next(file, parts, count, at, flags);
}
ssize_t pwritev64v2(int file, const struct iovec *parts, int count, off64_t at, int flags) {
  NEXT(pwritev64v2);
  FAIL(write_errno, file);
  if (count > 1 && control && chosen(control->short_writes, file)) count = 1;
  return next(file, parts, count, at, flags);
}

ssize_t read(int file, void *data, size_t size) {
  NEXT(read);
  FAIL_READ(file, lseek(file, 0, SEEK_CUR), size);
  return next(file, data, size);
}
ssize_t pread(int file, void *data, size_t size, off_t at) {
  NEXT(pread);
  FAIL_READ(file, at, size);
  return next(file, data, size, at);
}
ssize_t pread64(int file, void *data, size_t size, off64_t at) {
  NEXT(pread64);
  FAIL_READ(file, at, size);
  return next(file, data, size, at);
}
ssize_t readv(int file, const struct iovec *parts, int count) {
  NEXT(readv);
  FAIL_READ(file, lseek(file, 0, SEEK_CUR), total(parts, count));
  return next(file, parts, count);
}
ssize_t preadv(int file, const struct iovec *parts, int count, off_t at) {
  NEXT(preadv);
  FAIL_READ(file, at, total(parts, count));
  return next(file, parts, count, at);
}
ssize_t preadv2(int file, const struct iovec *parts, int count, off_t at, int flags) {
  NEXT(preadv2);
  FAIL_READ(file, at, total(parts, count));
  return next(file, parts, count, at, flags);
}
ssize_t preadv64v2(int file, const struct iovec *parts, int count, off64_t at, int flags) {
  NEXT(preadv64v2);
  FAIL_READ(file, at, total(parts, count));
  return next(file, parts, count, at, flags);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
  NEXT(sendfile);
  FAIL_READ(in, at ? *at : lseek(in, 0, SEEK_CUR), size);
  return next(out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
  NEXT(sendfile64);
  FAIL_READ(in, at ? *at : lseek(in, 0, SEEK_CUR), size);
  return next(out, in, at, size);
}

/* The wall clock. */
static void step(struct timespec *now) {
  int64_t nanoseconds = now->tv_nsec + control->clock_nanoseconds % 1000000000;
  now->tv_sec += control->clock_nanoseconds / 1000000000;
  if (nanoseconds < 0) { nanoseconds += 1000000000; now->tv_sec--; }
  if (nanoseconds >= 1000000000) { nanoseconds -= 1000000000; now->tv_sec++; }
  now->tv_nsec = nanoseconds;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  NEXT(clock_gettime);
  int result = next(clock, now);
  if (!result && control && control->clock_nanoseconds &&
      (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    step(now);
  return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  (void)zone;
  struct timespec precise;
  if (clock_gettime(CLOCK_REALTIME, &precise)) return -1;
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *where) {
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  if (where) *where = now.tv_sec;
  return now.tv_sec;
}
