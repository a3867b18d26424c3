/* Beam search. */
#include "base/mem.h"
#include "coordinator/engine/state.h"

struct beam {
    uint32_t width;
};

enum err beam_create(struct engine *e, struct job *job)
{
    (void)e;
    return MEM_NEW(&job->beam);
}

void beam_destroy(struct engine *e, struct beam *beam)
{
    (void)e;
    mem_free(beam);
}

void beam_sampling(const struct beam *beam, struct sampling_params *p)
{
    (void)beam, (void)p;
}
void beam_preempt(struct engine *e, struct group *g, struct job *job)
{
    (void)e, (void)g, (void)job;
}
void beam_learn(struct engine *e, struct group *g, struct sequence *s, const struct step_token *t,
                uint32_t n)
{
    (void)e, (void)g, (void)s, (void)t, (void)n;
}
void job_end_beams(struct engine *e, struct job *job, const struct ending *end)
{
    (void)e, (void)job, (void)end;
}
