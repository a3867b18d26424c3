/* The table of options. A row here is a flag, a variable HEDDLE_NAME, a YAML key and a line of help. */
#include "cli/options.h"

#define AT(field) offsetof(struct options, field)
#define FRONT (VERB_SERVE | VERB_COORDINATOR)
#define ENGINE FRONT
#define DEVICE (VERB_SERVE | VERB_WORKER | VERB_PLAN)
#define CLUSTER (VERB_SERVE | VERB_COORDINATOR | VERB_WORKER)
#define MODELS (CLUSTER | VERB_INSPECT | VERB_TOKENIZE | VERB_PLAN | VERB_QUANTIZE)
#define ALL (MODELS | VERB_CHAT | VERB_DOCTOR)
#define BIG 9e15

// clang-format off
const struct conf_row option_rows[] = {
    /* name, aliases, kind, field, min, max, default, choices, verbs, group, help */
    {"config", NULL, CONF_STRING, AT(config), 0, 0, NULL, NULL, ALL, "General", "YAML file of options"},
    {"model", "m", CONF_STRING, AT(model), 0, 0, NULL, NULL, MODELS, "General", "model directory (Hugging Face layout)"},
    {"log-level", NULL, CONF_CHOICE, AT(log_level), 0, 0, "info", "debug info warn error", ALL, "General", "least level to log"},
    {"log-format", NULL, CONF_CHOICE, AT(log_format), 0, 0, "text", "text json", ALL, "General", "form of log lines"},

    {"host", NULL, CONF_STRING, AT(host), 0, 0, "127.0.0.1", NULL, FRONT, "Front", "address to listen on"},
    {"port", NULL, CONF_INT, AT(port), 0, 65535, "8000", NULL, FRONT, "Front", "HTTP port"},
    {"grpc-port", NULL, CONF_INT, AT(grpc_port), 0, 65535, "0", NULL, FRONT, "Front", "gRPC port for internal services, 0 = none"},
    {"uds", NULL, CONF_STRING, AT(uds), 0, 0, NULL, NULL, FRONT, "Front", "also listen on this Unix socket"},
    {"served-model-name", "a alias", CONF_STRING, AT(served_model_name), 0, 0, NULL, NULL, FRONT, "Front", "model name in the API; several with commas"},
    {"api-key", NULL, CONF_STRING, AT(api_key), 0, 0, NULL, NULL, FRONT, "Front", "key that clients must send; several with commas"},
    {"api-key-file", NULL, CONF_STRING, AT(api_key_file), 0, 0, NULL, NULL, FRONT, "Front", "file of keys, one a line"},
    {"ssl-certfile", NULL, CONF_STRING, AT(ssl_certfile), 0, 0, NULL, NULL, FRONT, "Front", "certificate of the HTTP port"},
    {"ssl-keyfile", NULL, CONF_STRING, AT(ssl_keyfile), 0, 0, NULL, NULL, FRONT, "Front", "key of the HTTP port"},
    {"allowed-origins", "cors-origins", CONF_STRING, AT(allowed_origins), 0, 0, NULL, NULL, FRONT, "Front", "CORS origins, * or several with commas"},
    {"chat-template", NULL, CONF_STRING, AT(chat_template), 0, 0, NULL, NULL, FRONT, "Front", "file with a chat template instead of the model's"},
    {"generation-config", "sampling-defaults", CONF_CHOICE, AT(generation_config), 0, 0, "auto", "auto none", FRONT, "Front", "default sampling from generation_config.json"},
    {"http-threads", NULL, CONF_INT, AT(http_threads), 1, 64, "1", NULL, FRONT, "Front", "event loops of the HTTP port"},
    {"max-body-bytes", NULL, CONF_BYTES, AT(max_body_bytes), 1024, BIG, "16M", NULL, FRONT, "Front", "largest request body"},
    {"max-logprobs", NULL, CONF_INT, AT(max_logprobs), 0, 32, "20", NULL, FRONT, "Front", "most logprobs a request may ask for"},
    {"shutdown-timeout", NULL, CONF_INT, AT(shutdown_timeout), 0, 86400, "30", NULL, FRONT, "Front", "seconds that requests in flight may take after SIGTERM"},
    {"webui", NULL, CONF_BOOL, AT(webui), 0, 0, "true", NULL, FRONT, "Front", "serve the chat page at /"},
    {"log-requests", NULL, CONF_BOOL, AT(log_requests), 0, 0, "false", NULL, FRONT, "Front", "log a line for each request"},

    {"tensor-parallel-size", "tp", CONF_INT, AT(tp), 1, 64, "1", NULL, CLUSTER | VERB_PLAN, "Cluster", "ranks that share one copy of the weights"},
    {"data-parallel-size", "dp", CONF_INT, AT(dp), 1, 4096, "1", NULL, CLUSTER, "Cluster", "copies of the model"},
    {"coordinator", NULL, CONF_STRING, AT(coordinator), 0, 0, NULL, NULL, VERB_WORKER, "Cluster", "HOST:PORT (or unix:PATH) of the coordinator"},
    {"worker-address", NULL, CONF_STRING, AT(worker_address), 0, 0, "127.0.0.1:8001", NULL, VERB_COORDINATOR, "Cluster", "where workers dial in, HOST:PORT"},
    {"cluster-token", NULL, CONF_STRING, AT(cluster_token), 0, 0, NULL, NULL, CLUSTER, "Cluster", "secret that workers must show (better: the variable or the file)"},
    {"cluster-token-file", NULL, CONF_STRING, AT(cluster_token_file), 0, 0, NULL, NULL, CLUSTER, "Cluster", "file with that secret"},
    {"cluster-certfile", NULL, CONF_STRING, AT(cluster_certfile), 0, 0, NULL, NULL, VERB_COORDINATOR | VERB_WORKER, "Cluster", "certificate for the worker port (mTLS)"},
    {"cluster-keyfile", NULL, CONF_STRING, AT(cluster_keyfile), 0, 0, NULL, NULL, VERB_COORDINATOR | VERB_WORKER, "Cluster", "its key"},
    {"cluster-ca-certs", NULL, CONF_STRING, AT(cluster_ca_certs), 0, 0, NULL, NULL, VERB_COORDINATOR | VERB_WORKER, "Cluster", "certificate authority of both ends"},
    {"rank", "node-rank", CONF_INT, AT(rank), -1, 63, "-1", NULL, VERB_WORKER, "Cluster", "tensor-parallel rank; -1 = from MPI, PMIx, Slurm or LWS"},
    {"replica", NULL, CONF_INT, AT(replica), -1, 4095, "-1", NULL, VERB_WORKER, "Cluster", "data-parallel index; -1 = world rank / tp"},
    {"collective", NULL, CONF_CHOICE, AT(collective), 0, 0, "auto", "auto none shm mpi nccl", VERB_SERVE | VERB_WORKER, "Cluster", "how ranks sum: auto probes and logs why"},
    {"launcher", NULL, CONF_CHOICE, AT(launcher), 0, 0, "auto", "auto mpirun fork none", VERB_SERVE, "Cluster", "how serve starts its ranks"},
    {"hostfile", NULL, CONF_STRING, AT(hostfile), 0, 0, NULL, NULL, VERB_SERVE, "Cluster", "hosts for mpirun"},
    {"mpirun-args", NULL, CONF_STRING, AT(mpirun_args), 0, 0, NULL, NULL, VERB_SERVE, "Cluster", "more arguments for mpirun, blank-separated"},
    {"reconnect-timeout", NULL, CONF_INT, AT(reconnect_timeout), 0, 86400, "300", NULL, VERB_WORKER, "Cluster", "seconds a worker looks for its coordinator"},
    {"restarts-max", "max-restarts", CONF_INT, AT(restarts_max), 0, 1000000, "100", NULL, VERB_SERVE, "Cluster", "restarts of a group within an hour before serve gives up"},
    {"watchdog-timeout", NULL, CONF_INT, AT(watchdog_timeout), 1, 86400, "300", NULL, FRONT, "Cluster", "seconds that a step may take"},

    {"max-num-seqs", "max-running-requests np parallel", CONF_INT, AT(max_num_seqs), 1, 65536, "64", NULL, CLUSTER | VERB_PLAN, "Scheduling", "sequences running at once in a group"},
    {"max-num-batched-tokens", "max-prefill-tokens chunked-prefill-size b", CONF_INT, AT(max_num_batched_tokens), 0, 1048576, "0", NULL, CLUSTER | VERB_PLAN, "Scheduling", "tokens of one step, 0 = the device's choice"},
    {"max-model-len", "context-length c ctx-size", CONF_INT, AT(max_model_len), 0, 16777216, "0", NULL, CLUSTER | VERB_PLAN, "Scheduling", "longest sequence, 0 = the model's"},
    {"max-num-queued-reqs", "max-queued-requests", CONF_INT, AT(max_num_queued_reqs), 1, 1000000, "1024", NULL, ENGINE, "Scheduling", "requests that may wait; then 429"},
    {"max-num-queued-tokens", NULL, CONF_INT, AT(max_num_queued_tokens), 0, BIG, "0", NULL, ENGINE, "Scheduling", "prompt tokens that may wait, 0 = no bound"},
    {"enable-prefix-caching", NULL, CONF_BOOL, AT(prefix_caching), 0, 0, "true", NULL, ENGINE, "Scheduling", "share the KV of equal prefixes"},
    {"kv-offload", NULL, CONF_CHOICE, AT(kv_offload), 0, 0, "auto", "auto always", ENGINE, "Scheduling", "move KV blocks between tiers where that is cheaper than computing them, or always"},
    {"pipeline-depth", NULL, CONF_INT, AT(pipeline_depth), 1, 4, "2", NULL, ENGINE, "Scheduling", "plans in flight of a group"},
    {"speculative-tokens", "num-speculative-tokens", CONF_INT, AT(speculative_tokens), 0, 16, "0", NULL, CLUSTER | VERB_PLAN, "Scheduling", "most drafts verified in a step, by prompt lookup or --draft-model; 0 = off, 4 with a draft model"},
    {"draft-model", "speculative-model speculative-draft-model-path md model-draft", CONF_STRING, AT(draft_model), 0, 0, NULL, NULL, CLUSTER | VERB_PLAN, "Scheduling", "directory of a small model of the same vocabulary that guesses tokens ahead"},
    {"draft-policy", NULL, CONF_CHOICE, AT(draft_policy), 0, 0, "auto", "auto always", ENGINE, "Scheduling", "auto = drafts only while they pay by measured times"},
    {"record", NULL, CONF_STRING, AT(record), 0, 0, NULL, NULL, ENGINE, "Scheduling", "write the engine's inputs here for heddle replay"},

    {"device", NULL, CONF_CHOICE, AT(device), 0, 0, "auto", "auto cpu cuda", DEVICE, "Device", "what computes"},
    {"device-index", NULL, CONF_INT, AT(device_index), -1, 1023, "-1", NULL, DEVICE, "Device", "GPU of this rank, -1 = local rank"},
    {"dtype", NULL, CONF_CHOICE, AT(dtype), 0, 0, "auto", "auto float32 float16 bfloat16", DEVICE, "Device", "type of the weights"},
    {"quantization", "q format", CONF_CHOICE, AT(quantization), 0, 0, "none", "none auto int8 int4 fp8", DEVICE | VERB_QUANTIZE, "Device", "format of the weights on the device; auto = int8 or int4 where memory asks for it"},
    {"head-quantization", "head-format", CONF_CHOICE, AT(head_quantization), 0, 0, "auto", "auto int8 int4", DEVICE | VERB_QUANTIZE, "Device", "format of the output projection; auto = int8 beside quantized weights"},
    {"draft-quantization", NULL, CONF_CHOICE, AT(draft_quantization), 0, 0, "same", "same none int8 int4 fp8", DEVICE, "Device", "format of the draft model's weights; same = as --quantization"},
    {"kv-cache-dtype", "ctk", CONF_CHOICE, AT(kv_cache_dtype), 0, 0, "auto", "auto float32 bfloat16 float16 int8 fp8", DEVICE, "Device", "type of the KV cache"},
    {"block-size", "page-size", CONF_INT, AT(block_size), 0, 1024, "0", NULL, DEVICE, "Device", "tokens of a KV block, 0 = the device's choice"},
    {"num-blocks-override", "num-gpu-blocks-override", CONF_INT, AT(blocks_override), 0, 1e9, "0", NULL, DEVICE, "Device", "fixed number of KV blocks"},
    {"kv-cache-bytes", NULL, CONF_BYTES, AT(kv_cache_bytes), 0, BIG, "0", NULL, DEVICE, "Device", "memory of the KV cache of a rank, 0 = from --memory-utilization"},
    {"memory-utilization", "gpu-memory-utilization mem-fraction-static", CONF_NUMBER, AT(memory_utilization), 0.01, 1, "0.5", NULL, DEVICE, "Device", "share of free memory to take at most"},
    {"swap-bytes", NULL, CONF_BYTES, AT(swap_bytes), 0, BIG, "0", NULL, DEVICE, "Device", "host memory of a rank for KV blocks that the device gives up"},
    {"kv-disk", NULL, CONF_STRING, AT(kv_disk), 0, 0, NULL, NULL, DEVICE, "Device", "local directory for KV blocks that host memory gives up"},
    {"kv-disk-space", "kv-disk-bytes", CONF_BYTES, AT(kv_disk_space), 0, BIG, "0", NULL, DEVICE, "Device", "size of a rank's file there"},
    {"threads", "t", CONF_INT, AT(threads), 0, 4096, "0", NULL, DEVICE | VERB_QUANTIZE, "Device", "CPU threads of a rank, 0 = its share of the cores"},
    {"numa", NULL, CONF_STRING, AT(numa), 0, 0, "off", NULL, DEVICE, "Device", "CPU: off, auto (ranks are dealt out to the nodes, each with the memory there) or a node's number"},
    {"isa", NULL, CONF_CHOICE, AT(isa), 0, 0, "auto", "auto reference avx2 avx512 vnni bf16 amx", DEVICE, "Device", "CPU instructions to use at most"},
    {"load-format", NULL, CONF_CHOICE, AT(load_format), 0, 0, "auto", "auto safetensors dummy", DEVICE | VERB_INSPECT | VERB_QUANTIZE, "Device", "dummy = random weights of the model's shape"},
    {"enable-deterministic-inference", "deterministic", CONF_BOOL, AT(deterministic), 0, 0, "false", NULL, DEVICE, "Device", "batch-invariant results on GPUs (CPUs always are)"},
    {"enforce-eager", NULL, CONF_BOOL, AT(enforce_eager), 0, 0, "false", NULL, DEVICE, "Device", "CUDA: launch every operation by itself, record no graphs"},
    {"seed", "random-seed", CONF_INT, AT(seed), 0, BIG, "0", NULL, DEVICE | VERB_QUANTIZE, "Device", "seed of dummy weights"},

    {"url", NULL, CONF_STRING, AT(url), 0, 0, "http://127.0.0.1:8000", NULL, VERB_CHAT, "Tools", "server to talk to"},
    {"system", NULL, CONF_STRING, AT(system), 0, 0, NULL, NULL, VERB_CHAT, "Tools", "system message"},
    {"prompt", "p", CONF_STRING, AT(prompt), 0, 0, NULL, NULL, VERB_CHAT, "Tools", "ask this once and leave"},
    {"temperature", NULL, CONF_NUMBER, AT(temperature), -1, 2, "-1", NULL, VERB_CHAT, "Tools", "-1 = the model's default"},
    {"max-tokens", "n", CONF_INT, AT(max_tokens), 1, 1e9, "256", NULL, VERB_CHAT, "Tools", "longest answer"},
    {"stats", NULL, CONF_BOOL, AT(stats), 0, 0, "false", NULL, VERB_CHAT, "Tools", "print the times of each answer (always on a terminal)"},
    {"add-special-tokens", NULL, CONF_BOOL, AT(special_tokens), 0, 0, "true", NULL, VERB_TOKENIZE, "Tools", "with the tokens the model expects at the start"},
    {"out", "output o", CONF_STRING, AT(output), 0, 0, NULL, NULL, VERB_QUANTIZE, "Tools", "directory to write; made where it is missing"},
    {"json", NULL, CONF_BOOL, AT(json), 0, 0, "false", NULL, VERB_INSPECT | VERB_TOKENIZE | VERB_PLAN | VERB_DOCTOR, "Tools", "print JSON"},
};
// clang-format on
const int n_option_rows = sizeof option_rows / sizeof *option_rows;

const struct conf_refusal option_refusals[] = {
    {"pipeline-parallel-size", "layers are not split over ranks; use --tensor-parallel-size"},
    {"pp", "layers are not split over ranks; use --tp"},
    {"nnodes", "start `heddle coordinator` once and `mpirun … heddle worker` on the nodes"},
    {"dist-init-addr", "workers take --coordinator HOST:PORT"},
    {"master-addr", "workers take --coordinator HOST:PORT"},
    {"tool-call-parser", "tool calls are not parsed yet; tools reach the chat template"},
    {"enable-auto-tool-choice", "tool calls are not parsed yet; tools reach the chat template"},
    {"reasoning-parser", "reasoning is not split from the answer yet"},
    {"enable-lora", "adapters are not loaded yet"},
    {"lora-modules", "adapters are not loaded yet"},
    {"otlp-traces-endpoint", "traces are not exported yet; see /metrics"},
    {"enable-chunked-prefill", "prompts are always computed in chunks that fit --max-num-batched-tokens"},
    {"disable-radix-cache", "use --no-enable-prefix-caching"},
    {"trust-remote-code", "no code of a model is ever run"},
    {"enable-metrics", "metrics are always at /metrics"},
    {"scheduling-policy", "priority, fair share and deadlines always hold; see the request's fields"},
    {NULL, NULL},
};
