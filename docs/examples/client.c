/* Talks to a Heddle server from C: says what it serves, then streams a completion of the words
 * given.
 *
 *     cc client.c -lheddle_client -o client && ./client 127.0.0.1:8001 "Once upon a time"
 *
 * HEDDLE_API_KEY holds the key where the server wants one. Ctrl-C ends the request, not the server.
 */
#include <heddle/client.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

static int print_reply(void *ctx, const struct heddle_reply *reply)
{
    (void)ctx;
    fputs(reply->text, stdout);
    fflush(stdout);
    if (*reply->finish_reason)
        printf("\n[%s: %u prompt tokens, %u of them cached; %u new]\n", reply->finish_reason,
               reply->prompt_tokens, reply->cached_tokens, reply->completion_tokens);
    return interrupted; /* not 0 cancels the request */
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: %s HOST:PORT PROMPT\n", argv[0]);
        return 2;
    }
    struct heddle_options options = {.address = argv[1], .token = getenv("HEDDLE_API_KEY")};
    struct heddle_client *client;
    struct heddle_model model;
    int status = heddle_connect(&options, &client);
    if (status == HEDDLE_OK) {
        signal(SIGINT, on_interrupt);
        status = heddle_model_info(client, NULL, &model);
        if (status == HEDDLE_OK)
            printf("%s, context %u, %u of %u groups ready\n", model.name, model.context_max,
                   model.groups_ready, model.groups);
        struct heddle_request request = {
            .text = argv[2],
            .sampling = {.given = HEDDLE_MAX_TOKENS | HEDDLE_TEMPERATURE,
                         .max_tokens = 64,
                         .temperature = 0.7f}};
        if (status == HEDDLE_OK) status = heddle_generate(client, &request, print_reply, NULL);
        heddle_close(client);
    }
    if (status != HEDDLE_OK) fprintf(stderr, "%s (status %d)\n", heddle_last_error(), status);
    return status == HEDDLE_OK ? 0 : 1;
}
