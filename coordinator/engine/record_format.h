/* The fields of a record's entries, once for writing and reading: their order is the format. */
#pragma once

#define RECORD_MAGIC "HDLREC2\n"
enum { RECORD_MAGIC_BYTES = 8, RECORD_NAME_BYTES = 6 }; /* the format's digit follows the name */

#define RECORD_CONFIG_FIELDS(X)                                                                    \
    X(n_groups)                                                                                    \
    X(n_sequences_max) X(step_tokens_max) X(context_max) X(n_queued_max) X(n_queued_tokens_max)    \
        X(pipeline_depth) X(prefix_cache) X(hash_salt) X(n_speculative_tokens) X(step_timeout_us)   \
            X(draft_always) X(always_offload)

#define RECORD_INFO_FIELDS(X)                                                                      \
    X(epoch)                                                                                       \
    X(n_ranks) X(block_size) X(n_blocks) X(n_host_blocks) X(n_slots_max) X(step_tokens_max)        \
        X(step_rows_max) X(context_max) X(vocab_size) X(window) X(draft_tokens_max) X(block_bytes) \
            X(has_draft_model) X(n_disk_blocks) X(save_ns) X(load_ns) X(fetch_ns) X(step_prompt_max)

#define RECORD_REQUEST_FIELDS(X)                                                                   \
    X(id)                                                                                          \
    X(max_tokens) X(n_choices) X(n_best_of) X(beam_width) X(early_stopping) X(never_early) X(ignore_eos)          \
        X(priority) X(tenant) X(tenant_weight) X(cache_salt) X(no_prefix_cache) X(deadline_us)     \
            X(arrival_us)
