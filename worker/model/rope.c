/* Rotary frequencies and their scalings, as tables of cos and sin.
 *
 * Frequencies and angles are rounded to float where transformers rounds them, so that far positions
 * agree with it; cos and sin of the rounded angle are exact. */
#include "worker/model/config.h"

#include <math.h>

static double base_frequency(const struct rope_config *r, int i)
{
    return 1.0 / pow(r->theta, 2.0 * i / r->rotary_dim);
}

/* Llama 3.1: long waves are stretched, short ones kept, those between blended by wavelength. */
static double llama3_frequency(const struct rope_config *r, int i)
{
    double f = base_frequency(r, i), wavelength = 2 * M_PI / f,
           context = (double)r->original_context;
    if (wavelength > context / r->low_freq_factor) return f / r->factor;
    if (wavelength < context / r->high_freq_factor) return f;
    double blend =
        (context / wavelength - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    return (1 - blend) * f / r->factor + blend * f;
}

/* YaRN (Peng et al. 2023, section 3.2): the dimension that turns `turns` times over the context. */
static double yarn_dimension(const struct rope_config *r, double turns)
{
    return r->rotary_dim * log((double)r->original_context / (turns * 2 * M_PI)) /
           (2 * log(r->theta));
}

static double yarn_frequency(const struct rope_config *r, int i)
{
    double low = yarn_dimension(r, r->beta_fast), high = yarn_dimension(r, r->beta_slow);
    if (r->truncate) low = floor(low), high = ceil(high);
    low = fmax(low, 0);
    high = fmin(high, r->rotary_dim - 1);
    if (low == high) high += 0.001;
    double ramp = fmin(fmax((i - low) / (high - low), 0), 1), f = base_frequency(r, i);
    return f / r->factor * ramp + f * (1 - ramp);
}

static double mscale_of(double scale, double mscale)
{
    return scale <= 1 ? 1 : 0.1 * mscale * log(scale) + 1;
}

/* What cos and sin are multiplied by (section 3.4's temperature, squared over q and k). */
static double yarn_attention(const struct rope_config *r)
{
    if (r->attention_factor > 0) return r->attention_factor;
    if (r->mscale > 0 && r->mscale_all_dim > 0)
        return mscale_of(r->factor, r->mscale) / mscale_of(r->factor, r->mscale_all_dim);
    return mscale_of(r->factor, 1);
}

static double frequency(const struct rope_config *r, int i)
{
    switch (r->type) {
    case ROPE_LINEAR:
        return base_frequency(r, i) / r->factor;
    case ROPE_LLAMA3:
        return llama3_frequency(r, i);
    case ROPE_YARN:
        return yarn_frequency(r, i);
    default:
        return base_frequency(r, i); /* dynamic differs only beyond the trained context */
    }
}

void config_rope_tables(const struct model_config *c, int first, int end, float *out_cos,
                        float *out_sin)
{
    const struct rope_config *r = &c->rope;
    enum { TILE = 64 };
    int half = r->rotary_dim / 2;
    double by = r->type == ROPE_YARN ? yarn_attention(r) : 1;
    for (int tile = 0; tile < half; tile += TILE) {
        float f[TILE];
        int n = half - tile < TILE ? half - tile : TILE;
        for (int i = 0; i < n; i++)
            f[i] = (float)frequency(r, tile + i);
        for (int p = first; p < end; p++) {
            size_t at = (size_t)p * (size_t)half + (size_t)tile;
            for (int i = 0; i < n; i++) {
                double sine, cosine;
                float angle = (float)p * f[i];
                sincos(angle, &sine, &cosine);
                out_cos[at + (size_t)i] = (float)(cosine * by);
                out_sin[at + (size_t)i] = (float)(sine * by);
            }
        }
    }
}
