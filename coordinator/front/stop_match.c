/* See stop_match.h. The held text is at most one byte shorter than the longest stop string, so
 * comparing it anew for each byte costs at most n_stops comparisons of the last byte and, on a hit
 * there, one memcmp. */
#include "coordinator/front/stop_match.h"

#include <string.h>

void stop_match_init(struct stop_match *m, const struct span *stops, unsigned n_stops, bool keep)
{
    *m = (struct stop_match){.stops = stops, .n_stops = n_stops, .keep = keep};
    buf_init(&m->held, 0);
}

void stop_match_fini(struct stop_match *m)
{
    buf_fini(&m->held);
}

/* The longest stop string that is exactly the tail of text[n]: it begins first. */
static int match_at_end(const struct stop_match *m, const char *text, size_t n)
{
    int best = -1;
    for (unsigned i = 0; i < m->n_stops; i++) {
        struct span s = m->stops[i];
        if (s.n <= n && s.data[s.n - 1] == text[n - 1] && !memcmp(text + n - s.n, s.data, s.n) &&
            (best < 0 || s.n > m->stops[best].n))
            best = (int)i;
    }
    return best;
}

/* Length of the longest tail of text[n] that begins some stop string. */
static size_t partial_tail(const struct stop_match *m, const char *text, size_t n)
{
    size_t best = 0;
    for (unsigned i = 0; i < m->n_stops; i++) {
        struct span s = m->stops[i];
        size_t len = s.n - 1 < n ? s.n - 1 : n;
        for (; len > best; len--)
            if (text[n - len] == s.data[0] && !memcmp(text + n - len, s.data, len)) best = len;
    }
    return best;
}

enum err stop_match_feed(struct stop_match *m, const char *text, size_t n, struct buf *out,
                         int *out_found)
{
    *out_found = -1;
    if (!m->n_stops) return buf_add(out, text, n);
    size_t before = m->held.n;
    TRY(buf_add(&m->held, text, n));
    for (size_t end = before + 1; end <= m->held.n; end++) {
        int found = match_at_end(m, m->held.data, end);
        if (found < 0) continue;
        TRY(buf_add(out, m->held.data, m->keep ? end : end - m->stops[found].n));
        buf_clear(&m->held);
        *out_found = found;
        return OK;
    }
    if (!m->held.n) return OK;
    size_t keep = partial_tail(m, m->held.data, m->held.n), go = m->held.n - keep;
    TRY(buf_add(out, m->held.data, go));
    memmove(m->held.data, m->held.data + go, keep);
    m->held.n = keep;
    m->held.data[keep] = 0;
    return OK;
}

enum err stop_match_flush(struct stop_match *m, struct buf *out)
{
    TRY(buf_add(out, buf_string(&m->held), m->held.n));
    buf_clear(&m->held);
    return OK;
}
