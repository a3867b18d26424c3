/* heddle: one program, many verbs. Finds the verb, reads its options, runs it. */
#include "base/log.h"
#include "cli/verbs.h"
#if __has_include("coordinator/engine/sim.h")
#include "coordinator/engine/sim.h"
#define HAVE_SIM
#endif

#include <signal.h>
#include <stdio.h>
#include <string.h>

struct verb_row {
    const char *name;
    enum verb bit;
    int (*run)(struct conf *c, struct options *o);
    const char *arguments, *summary;
};

static const struct verb_row verbs[] = {
    {"serve", VERB_SERVE, verb_serve, "MODEL [options]", "coordinator and worker ranks on this machine"},
    {"coordinator", VERB_COORDINATOR, verb_coordinator, "MODEL [options]", "the coordinator alone; workers dial in"},
    {"worker", VERB_WORKER, verb_worker, "MODEL --coordinator HOST:PORT [options]", "one worker rank; start it with mpirun, srun or by hand"},
    {"chat", VERB_CHAT, verb_chat, "[--url URL] [options]", "talk to a running server"},
    {"inspect", VERB_INSPECT, verb_inspect, "MODEL", "what a model directory holds"},
    {"tokenize", VERB_TOKENIZE, verb_tokenize, "MODEL [TEXT]", "text to token ids (standard input without TEXT)"},
    {"plan", VERB_PLAN, verb_plan, "MODEL [options]", "the memory of a rank, without loading the model"},
    {"quantize", VERB_QUANTIZE, verb_quantize, "MODEL --format int8|int4 --out DIR", "write a model with packed 8 or 4-bit weights"},
    {"doctor", VERB_DOCTOR, verb_doctor, "", "what this machine has and lacks"},
};
/* Tools with arguments of their own. */
static const struct {
    const char *name, *summary;
    int (*run)(int argc, char **argv);
} tools[] = {
#ifdef HAVE_SIM
    {"sim", "simulate the coordinator: --seeds N --seed-base B | --trace FILE", sim_main},
    {"replay", "compute a recorded run again and compare: heddle replay FILE", replay_main},
#endif
    {NULL, NULL, NULL},
};
enum { N_VERBS = sizeof verbs / sizeof *verbs, N_TOOLS = sizeof tools / sizeof *tools - 1 };

static void print_verbs(FILE *to)
{
    fprintf(to, "heddle %s serves large language models\n\nusage: heddle VERB …; heddle VERB --help\n\n", HEDDLE_VERSION);
    for (int i = 0; i < N_VERBS; i++) fprintf(to, "  %-12s %s\n", verbs[i].name, verbs[i].summary);
    for (int i = 0; i < N_TOOLS; i++) fprintf(to, "  %-12s %s\n", tools[i].name, tools[i].summary);
}

static int print_help(const struct verb_row *verb, const struct conf *c)
{
    struct buf text;
    buf_init(&text, 0);
    buf_printf(&text, "usage: heddle %s %s\n%s\n", verb->name, verb->arguments, verb->summary);
    conf_help(c, &text);
    buf_add_string(&text, "\nEvery option is also a variable (--port: HEDDLE_PORT) and a key of the --config file;"
                          "\na flag wins over a variable, a variable over the file.\n");
    fputs(buf_string(&text), stdout);
    buf_fini(&text);
    return 0;
}

static void set_up_log(const struct options *o, const char *who)
{
    static const char *const levels[] = {"debug", "info", "warn", "error"};
    for (int i = 0; i < 4; i++)
        if (!strcmp(o->log_level, levels[i])) log_set_level((enum log_level)i);
    log_set_json(!strcmp(o->log_format, "json"));
    log_set_who(who);
}

static int run_verb(const struct verb_row *verb, int argc, char **argv)
{
    struct options options = {0};
    struct conf conf;
    int code;
    enum err e = conf_init(&conf, option_rows, n_option_rows, option_refusals, verb->bit, &options);
    if (!e) e = conf_read(&conf, argc, argv);
    if (e) {
        fprintf(stderr, "heddle %s: %s\n", verb->name, err_detail());
        code = 2;
    } else if (conf.help) code = print_help(verb, &conf);
    else {
        set_up_log(&options, verb->name);
        code = verb->run(&conf, &options);
    }
    conf_fini(&conf);
    return code;
}

int verb_fail(const char *verb)
{
    fprintf(stderr, "heddle %s: %s\n", verb, err_detail());
    return 1;
}

enum err verb_cluster_token(struct conf *c, const struct options *o, const char **out)
{
    *out = o->cluster_token;
    if (!o->cluster_token_file) return OK;
    struct buf text;
    buf_init(&text, 4096);
    enum err e = buf_read_file(&text, o->cluster_token_file, 4096);
    size_t n = e ? 0 : strcspn(buf_string(&text), "\r\n");
    if (!e && !n) e = err_set(ERR_INVALID, "%s: no token on its first line", o->cluster_token_file);
    if (!e) e = arena_copy_string(&c->arena, text.data, n, (char **)out);
    buf_fini(&text);
    return e;
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    const char *name = argc > 1 ? argv[1] : "--help";
    if (!strcmp(name, "--help") || !strcmp(name, "-h") || !strcmp(name, "help")) {
        print_verbs(stdout);
        return argc > 1 ? 0 : 2;
    }
    if (!strcmp(name, "--version") || !strcmp(name, "version")) {
        printf("heddle %s\n", HEDDLE_VERSION);
        return 0;
    }
    for (int i = 0; i < N_VERBS; i++)
        if (!strcmp(name, verbs[i].name)) return run_verb(&verbs[i], argc - 1, argv + 1);
    for (int i = 0; i < N_TOOLS; i++)
        if (!strcmp(name, tools[i].name)) return tools[i].run(argc - 1, argv + 1);
    fprintf(stderr, "heddle: no verb '%s'; heddle --help lists them\n", name);
    return 2;
}
