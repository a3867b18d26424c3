/* One line per event. Knows nothing of who speaks. */
#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static _Atomic int level_min = LOG_INFO, json_on;
static char who_name[64] = "heddle";
static const char *const level_names[] = {"debug", "info", "warn", "error"};

void log_set_level(enum log_level level) { atomic_store(&level_min, (int)level); }
void log_set_json(int on) { atomic_store(&json_on, on); }
void log_set_who(const char *who) { snprintf(who_name, sizeof who_name, "%s", who); }

/* Escapes for a JSON string; control characters become spaces in either form. */
static size_t clean(char *out, size_t size, const char *in, int json)
{
    size_t n = 0;
    for (; *in && n + 3 < size; in++) {
        unsigned char c = (unsigned char)*in;
        if (json && (c == '"' || c == '\\')) out[n++] = '\\';
        out[n++] = c < 0x20 ? ' ' : (char)c;
    }
    out[n] = 0;
    return n;
}

void log_line(enum log_level level, const char *format, ...)
{
    if ((int)level < atomic_load_explicit(&level_min, memory_order_relaxed)) return;
    char words[2048], safe[4096], line[4400];
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    struct timespec now;
    struct tm parts;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &parts);
    char stamp[32];
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%S", &parts);
    int json = atomic_load(&json_on), ms = (int)(now.tv_nsec / 1000000);
    clean(safe, sizeof safe, words, json);
    int n = snprintf(line, sizeof line,
                     json ? "{\"time\":\"%s.%03dZ\",\"level\":\"%s\",\"who\":\"%s\",\"text\":\"%s\"}\n"
                          : "%s.%03dZ %-5s %s: %s\n",
                     stamp, ms, level_names[level], who_name, safe);
    if (n > (int)sizeof line) n = (int)sizeof line;
    if (write(STDERR_FILENO, line, (size_t)n) < 0) return; /* nowhere left to say it */
}
