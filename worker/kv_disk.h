/* The disk tier of one rank: a private file of KV blocks, and a thread that moves blocks between it
 * and host memory while steps go on.
 *
 * The file has no name (or loses it at once), is as large as it will ever be from the start and is
 * gone with the process: nothing stale is ever read. Every block has a checksum in memory; what
 * cannot be written, or not be read back exactly, is reported as failed and never as content.
 *
 * A step only queues. Transfers of a kind end in the order in which they were queued; whoever
 * listens is told how many have, from the thread. Fetches go before spills: somebody waits for
 * them. Never knows what a block holds or who wants it. */
#pragma once
#include "base/err.h"
#include "proto/plan.h"

struct kv_disk;
/* Blocks of block_bytes that a file of so many bytes holds. */
uint64_t kv_disk_blocks(uint64_t bytes, uint64_t block_bytes);
/* Makes the file in dir and measures it. host: [n_host][block_bytes], outlives the disk. ERR_IO
 * names the directory: not there, no permission, no space. */
enum err kv_disk_open(const char *dir, uint64_t n_blocks, void *host, uint64_t n_host,
                      uint64_t block_bytes, struct kv_disk **out);
void kv_disk_close(struct kv_disk *d); /* accepts NULL */
/* What reading a block took lately. */
uint32_t kv_disk_fetch_ns(const struct kv_disk *d);
/* Who hears of ended transfers, on the disk's thread; NULL = nobody. The struct and its arrays live
 * during the call. After it returns the former one is not called any more. */
void kv_disk_listen(struct kv_disk *d, void (*tell)(void *ctx, const struct moved *moved),
                    void *ctx);
/* A new epoch: what was queued is dropped, counts begin at zero, host memory is not touched until
 * something new is queued. Never waits for the disk. */
void kv_disk_reset(struct kv_disk *d, uint64_t epoch);
/* Queues a plan's fetches and spills, whose ids were checked. ERR_FORMAT when more than
 * PLAN_TRANSFERS_MAX of a kind would wait. */
enum err kv_disk_start(struct kv_disk *d, const struct step_plan *plan);
