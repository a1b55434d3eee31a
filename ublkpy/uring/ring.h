/* SPDX-License-Identifier: MIT */
/*
 * A raw io_uring: two mappings, head and tail indices, one system call.
 *
 * Every function returns 0 or a count on success and -errno on failure. A ring
 * belongs to the thread that made it; nothing here takes a lock.
 */
#ifndef UBLKPY_RING_H
#define UBLKPY_RING_H

#include <stddef.h>
#include <stdint.h>

#include "io_uring.h"

/*
 * Owner: the caller allocates it, ur_ring_init() fills it, ur_ring_exit()
 * releases what it holds. The pointers below point into the ring's own two
 * mappings, shared with the kernel.
 */
struct ur_ring {
	int fd;
	int enter_fd;			/* fd, or its index once registered */
	unsigned int enter_flags;

	unsigned int *sq_head;		/* the kernel moves it */
	unsigned int *sq_tail;		/* we move it */
	unsigned int sq_mask;
	unsigned int sq_entries;
	unsigned int sqe_tail;		/* filled up to here, published on submit */
	unsigned int sqe_size;		/* 64 or 128 bytes */
	unsigned char *sqes;

	unsigned int *cq_head;		/* we move it */
	unsigned int *cq_tail;		/* the kernel moves it */
	unsigned int cq_mask;
	struct io_uring_cqe *cqes;

	void *ring_map;
	size_t ring_map_len;
	size_t sqes_map_len;
};

/* Of each kind so many entries, rounded up to a power of two. */
int ur_ring_init(struct ur_ring *r, unsigned int entries,
		 unsigned int cq_entries, unsigned int flags);
void ur_ring_exit(struct ur_ring *r);

/* Has the kernel write to it when there are completions, or work that brings them. */
int ur_register_eventfd(struct ur_ring *r, int fd);

/* Spares the fd look-up in each io_uring_enter(); only for the calling thread. */
int ur_register_ring_fd(struct ur_ring *r);
int ur_register_files(struct ur_ring *r, const int *fds, unsigned int nr);

/* An empty table of nr buffers, for those that the driver registers. */
int ur_register_buffer_slots(struct ur_ring *r, unsigned int nr);

/*
 * A ring of provided buffers (a power of two) in memory of the caller, which
 * stays his and must last as long as the ring.
 */
int ur_register_buf_ring(struct ur_ring *r, struct io_uring_buf *bufs,
			 unsigned int nr, uint16_t group);

/* Hands all filled SQEs to the kernel and waits for wait_nr completions. */
int ur_submit_and_wait(struct ur_ring *r, unsigned int wait_nr);

/* Fills an SQE with a uring_cmd. */
int ur_prep_cmd(struct ur_ring *r, int fd, uint32_t cmd_op, const void *cmd,
		size_t cmd_len, uint64_t user_data);

/*
 * For control commands, one at a time, on a ring made with SQE128: submit a
 * uring_cmd, its cancellation, or a no-op that a kernel thread executes, and
 * fetch a completion without waiting (-EAGAIN when there is none).
 */
int ur_submit_cmd(struct ur_ring *r, int fd, uint32_t cmd_op, const void *cmd,
		  size_t cmd_len, uint64_t user_data);
int ur_submit_cancel(struct ur_ring *r, uint64_t victim, uint64_t user_data);
int ur_submit_async_nop(struct ur_ring *r, uint64_t user_data);
int ur_next_cqe(struct ur_ring *r, uint64_t *user_data, int32_t *res);

/* The rest is inline because it runs for each request. */

/* The next free SQE, not zeroed, or NULL when the submission queue is full. */
static inline struct io_uring_sqe *ur_get_sqe(struct ur_ring *r)
{
	/* Acquire: the kernel has read an SQE before it moves head past it. */
	unsigned int head = __atomic_load_n(r->sq_head, __ATOMIC_ACQUIRE);

	if (r->sqe_tail - head >= r->sq_entries)
		return NULL;
	return (struct io_uring_sqe *)
		(r->sqes + (size_t)(r->sqe_tail++ & r->sq_mask) * r->sqe_size);
}

/* Whether the kernel has not been handed all of them. */
static inline int ur_has_unsent(const struct ur_ring *r)
{
	return r->sqe_tail != *r->sq_tail;
}

/* How many completions are ready to be read with ur_cqe(). */
static inline unsigned int ur_cq_ready(const struct ur_ring *r)
{
	/* Acquire: a CQE is read only after the tail that announced it. */
	return __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE) - *r->cq_head;
}

static inline const struct io_uring_cqe *ur_cqe(const struct ur_ring *r,
						unsigned int nth)
{
	return &r->cqes[(*r->cq_head + nth) & r->cq_mask];
}

/* Gives the first nr completions back to the kernel. */
static inline void ur_cq_advance(struct ur_ring *r, unsigned int nr)
{
	/* Release: the CQEs are read before the kernel may reuse their slots. */
	__atomic_store_n(r->cq_head, *r->cq_head + nr, __ATOMIC_RELEASE);
}

#endif
