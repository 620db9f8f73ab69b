// A stand-in for the host compiler: it copies a library that the real one made of the same source, as the file `mode`
// beside it says. What it does not know it hands to the real compiler.
//
// Beside argv[0] lie: mode, one line of words; store, a folder of libraries named by the hash of their source; real, a
// link to the real compiler; log, one byte for each compilation; go, which mode "block" waits for.

#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[4096];

static const char* beside(const char* name) {
  static char path[5000];
  snprintf(path, sizeof(path), "%s/%s", folder, name);
  return path;
}

static char* contents(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  if (!file) return NULL;
  size_t space = 1 << 24;
  char* text = malloc(space);
  *size = fread(text, 1, space - 1, file);
  text[*size] = 0;
  fclose(file);
  return text;
}

static void append(const char* name, const char* text) {
  int fd = open(beside(name), O_WRONLY | O_CREAT | O_APPEND, 0600);
  if (fd < 0) return;
  if (write(fd, text, strlen(text)) < 0) exit(3);
  close(fd);
}

static int ends(const char* text, const char* tail) {
  size_t a = strlen(text), b = strlen(tail);
  return a >= b && strcmp(text + a - b, tail) == 0;
}

static void die(int signal) {
  kill(getpid(), signal);
  pause();
}

static void version(const char* what) {
  if (!strcmp(what, "version-hang")) sleep(3600);
  if (!strcmp(what, "version-exit")) exit(1);
  if (!strcmp(what, "version-killed")) die(SIGKILL);
  if (!strcmp(what, "version-crash")) die(SIGSEGV);
  if (!strcmp(what, "version-empty")) exit(0);
  if (!strcmp(what, "version-blank")) {
    puts("\n\n");
    exit(0);
  }
  if (!strcmp(what, "version-binary")) {
    fwrite("\xff\xfe\0\x80\n\xc3(", 1, 7, stdout);
    exit(0);
  }
  if (!strcmp(what, "version-long")) {
    for (int i = 0; i < 1 << 20; i++) fputs("0123456789abcdef", stdout);
    exit(0);
  }
  puts("c++ (stand-in) 1.0");
  exit(0);
}

int main(int argc, char** argv) {
  strncpy(folder, argv[0], sizeof(folder) - 1);
  char* slash = strrchr(folder, '/');
  if (slash) *slash = 0;
  size_t size;
  char* text = contents(beside("mode"), &size);
  char what[64] = "ok", once[8] = "";
  long amount = 0;
  if (text) {
    text[strcspn(text, "\n")] = 0;
    if (!strncmp(text, "once ", 5)) strcpy(once, "once"), text += 5;
    sscanf(text, "%63s %ld", what, &amount);
  }

  const char *source = NULL, *output = NULL;
  for (int i = 1; i < argc; i++) {
    if (!strcmp(argv[i], "--version")) version(what);
    if (!strcmp(argv[i], "-o") && i + 1 < argc) output = argv[i + 1];
    if (ends(argv[i], "module.cc")) source = argv[i];
  }

  char* code = source ? contents(source, &size) : NULL;
  char name[64];
  if (code) {
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < size; i++) hash = (hash ^ (unsigned char)code[i]) * 1099511628211u;
    snprintf(name, sizeof(name), "store/%016lx.so", (unsigned long)hash);
  }
  size_t bytes = 0;
  char* library = code && output ? contents(beside(name), &bytes) : NULL;
  if (!library) {  // not ours: the real compiler's
    char real[5000];
    ssize_t length = readlink(beside("real"), real, sizeof(real) - 1);
    if (length < 0) return 4;
    real[length] = 0;
    argv[0] = real;
    execv(real, argv);
    return 5;
  }
  append("log", "c");
  if (*once) {
    if (access(beside("used"), F_OK) == 0) strcpy(what, "ok");
    append("used", "u");
  }

  if (!strcmp(what, "exit")) {
    fputs("module.cc:1:1: error: the stand-in was told to fail\n", stderr);
    return 1;
  }
  if (!strcmp(what, "silent")) return 1;
  if (!strcmp(what, "binary")) {
    fwrite("\xff\xfe error: \x80\xc3(\n", 1, 15, stderr);
    return 1;
  }
  if (!strcmp(what, "long")) {
    for (int i = 0; i < 1 << 18; i++) fputs("module.cc:1:1: note: 0123456789\n", stderr);
    return 1;
  }
  if (!strcmp(what, "killed")) die(SIGKILL);
  if (!strcmp(what, "crash")) die(SIGSEGV);
  if (!strcmp(what, "none")) return 0;
  if (!strcmp(what, "directory")) return mkdir(output, 0700) != 0;
  if (!strcmp(what, "fifo")) return mkfifo(output, 0600) != 0;
  if (!strcmp(what, "link")) return symlink("/nowhere/library.so", output) != 0;
  if (!strcmp(what, "loop")) return symlink("library.so", output) != 0;
  if (!strcmp(what, "block")) {
    append("started", "s");
    while (access(beside("go"), F_OK) != 0) usleep(2000);
  }
  if (!strcmp(what, "slow")) usleep(amount * 1000);
  if (!strcmp(what, "empty")) bytes = 0;
  if (!strcmp(what, "truncated")) bytes = bytes * amount / 1000;
  if (!strcmp(what, "zeroed")) memset(library + bytes * amount / 1000, 0, bytes - bytes * amount / 1000);
  if (!strcmp(what, "text")) strcpy(library, "not a library\n"), bytes = 14;
  if (!strcmp(what, "symbolless")) library = contents(beside("store/symbolless.so"), &bytes);

  FILE* file = fopen(output, "wb");
  if (!file || fwrite(library, 1, bytes, file) != bytes || fclose(file) != 0) {
    perror("ld: error: cannot write the output");
    unlink(output);
    return 1;
  }
  chmod(output, 0755);
  return 0;
}
