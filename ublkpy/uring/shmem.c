// SPDX-License-Identifier: MIT
/*
 * Requests whose data is in memory that the client shares with us: nothing is
 * copied (ublk_drv.c, UBLK_F_SHMEM_ZC). The driver says where, with the index of
 * a buffer that was registered with it, and an offset.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <time.h>

#define MOMENT_NS	100000
#define MAX_MOMENTS	20000

static inline unsigned char *base_of(const struct uq_shared *s, uint32_t index)
{
	return __atomic_load_n(&s->bufs[index].base, __ATOMIC_ACQUIRE);
}

/*
 * The driver may name a buffer right before the command that registered it has
 * returned. That is a matter of moments: the command waits for no request any
 * more. But the buffer may also be none of ours, so it is not waited for long.
 */
static unsigned char *wait_for_base(const struct uq_shared *s, uint32_t index)
{
	const struct timespec moment = { .tv_nsec = MOMENT_NS };

	for (int i = 0; i < MAX_MOMENTS; i++) {
		/* First: what was shared before it ended is seen then. */
		bool under_way = __atomic_load_n(&s->registering,
						 __ATOMIC_ACQUIRE);
		unsigned char *base = base_of(s, index);

		if (base || !under_way)
			return base;
		nanosleep(&moment, NULL);
	}
	return NULL;
}

uint8_t shm_way(const struct uq_queue *q, const struct ublksrv_io_desc *iod,
		struct uq_io *io)
{
	const struct uq_shared *s = q->opt.shared;
	uint64_t offset = iod->addr & UBLK_SHMEM_ZC_OFF_MASK;
	uint64_t index = iod->addr >> UBLK_SHMEM_ZC_IDX_OFF;
	bool can_copy = q->opt.data == UQ_USER_COPY;
	unsigned char *base = NULL;

	if (s && index < UQ_MAX_SHARED) {
		base = base_of(s, (uint32_t)index);
		if (!base && !can_copy)
			base = wait_for_base(s, (uint32_t)index);
	}
	if (base && offset + iod_bytes(iod) <= s->bufs[index].len) {
		io->buf = base + offset;
		return UQ_IN_BUFFER;
	}
	/* Registered for another process: a daemon before us, for one. */
	if (can_copy)
		return UQ_COPIED;
	io->error = -EIO;
	return UQ_IN_BUFFER;
}

void uq_registering(struct uq_shared *s, int is_under_way)
{
	__atomic_store_n(&s->registering, (uint32_t)is_under_way,
			 __ATOMIC_RELEASE);
}

int uq_share(struct uq_shared *s, uint32_t index, void *base, uint64_t len)
{
	if (index >= UQ_MAX_SHARED)
		return -ENOSPC;
	s->bufs[index].len = len;
	/* Release: the length is there before the address. */
	__atomic_store_n(&s->bufs[index].base, base, __ATOMIC_RELEASE);
	return 0;
}

void uq_unshare(struct uq_shared *s, uint32_t index)
{
	__atomic_store_n(&s->bufs[index].base, NULL, __ATOMIC_RELEASE);
}
