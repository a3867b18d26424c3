/* heddle tokenize: text to token ids and their pieces. */
#include "base/json.h"
#include "cli/verbs.h"
#include "coordinator/text/tokenizer.h"

#include <stdio.h>
#include <string.h>

static enum err read_text(const struct conf *c, struct buf *text)
{
    char piece[65536];
    if (c->n_positionals > 1) return buf_add_string(text, c->positionals[1]);
    for (size_t n; (n = fread(piece, 1, sizeof piece, stdin));) TRY(buf_add(text, piece, n));
    return OK;
}

static void print_ids(const struct tokenizer *t, const struct token_list *ids, bool json)
{
    struct buf line;
    buf_init(&line, 0);
    for (size_t i = 0; i < ids->n; i++) {
        const char *piece = tokenizer_token_text(t, ids->ids[i]);
        if (json) buf_printf(&line, "%s%d", i ? "," : "[", ids->ids[i]);
        else buf_printf(&line, "%d\t%s\n", ids->ids[i], piece ? piece : "");
    }
    if (json) buf_add_string(&line, ids->n ? "]\n" : "[]\n");
    fwrite(buf_string(&line), 1, line.n, stdout);
    buf_fini(&line);
}

int verb_tokenize(struct conf *c, struct options *o)
{
    struct tokenizer *t = NULL;
    struct token_list ids;
    struct buf text;
    const char *model = o->model ? o->model : c->n_positionals ? c->positionals[0] : NULL;
    unsigned flags = TOKENIZER_PARSE_SPECIAL | (o->special_tokens ? TOKENIZER_ADD_SPECIAL : 0);
    buf_init(&text, (size_t)1 << 30);
    token_list_init(&ids, 0);
    enum err e = model ? tokenizer_open(model, &t) : err_set(ERR_INVALID, "which model? heddle tokenize MODEL [TEXT]");
    if (!e) e = read_text(c, &text);
    if (!e) e = tokenizer_encode(t, buf_string(&text), text.n, flags, &ids);
    if (!e) print_ids(t, &ids, o->json);
    token_list_fini(&ids);
    buf_fini(&text);
    tokenizer_close(t);
    return e ? verb_fail("tokenize") : 0;
}
