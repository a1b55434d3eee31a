// SPDX-License-Identifier: MIT
/*
 * How requests come from the driver and results go back: with a command for
 * each tag, or, in batch mode, with one that brings many tags and one that takes
 * many results (ublk_drv.c, UBLK_F_BATCH_IO).
 */
#define _GNU_SOURCE
#include "engine.h"

#include <sys/mman.h>

/* Fetched tags arrive in these; the kernel gives one buffer back to us a CQE. */
#define NR_FETCH_BUFS	32
#define FETCH_BUF_TAGS	128

/*
 * Where several threads take turns, so many requests are one's turn: enough to
 * pay for the command that ends it, few enough to leave some to the others.
 */
#define TURN		8U

#define NR_ARRAYS	4

static inline bool buffers_from_us(const struct uq_queue *q)
{
	return q->opt.data == UQ_COPY || q->opt.data == UQ_GET_DATA;
}

/* -- one command for each tag ---------------------------------------------- */

void drv_fetch_tag(struct uq_queue *q, uint32_t cmd_op, uint16_t tag,
		   int32_t res)
{
	struct io_uring_sqe *sqe;
	uint64_t addr = q->ios[tag].append_sector; /* mostly 0 */

	/* For the READ that ends, and for a WRITE that comes; not if it asks. */
	if (buffers_from_us(q))
		addr = (uint64_t)(uintptr_t)(q->opt.data == UQ_GET_DATA ?
						     q->ios[tag].buf :
						     tag_buf(q, tag));
	sqe = tag_cmd(q, cmd_op, tag, res, addr);
	sqe->user_data = user_data(FROM_TAG, tag);
	/* Where the driver is to register the next request's pages. */
	if (q->opt.data == UQ_AUTO_BUF)
		sqe->addr = tag | UBLK_AUTO_BUF_REG_FALLBACK << 16;
}

bool drv_tag_done(struct uq_queue *q, int32_t res)
{
	if (res == UBLK_IO_RES_OK || res == UBLK_IO_RES_NEED_GET_DATA)
		return true;
	if (res == UBLK_IO_RES_ABORT)
		q->live--;
	else
		q->failed = res < 0 ? res : -EPROTO;
	return false;
}

/*
 * Of the threads of a queue, each takes every threads-th tag. The block layer
 * gives out tags that lie side by side, and those just freed again, so that a
 * load which is not deep keeps within a range of them: with a range for each
 * thread, it would be one thread's alone.
 */
static int start_tags(struct uq_queue *q)
{
	int ret;

	for (uint32_t tag = q->opt.thread; tag < q->opt.depth;
	     tag += q->opt.threads) {
		drv_fetch_tag(q, UBLK_U_IO_FETCH_REQ, (uint16_t)tag, 0);
		q->live++;
	}
	/*
	 * All at once: 6.12 cannot cancel a queue of which it has seen only
	 * some of the tags.
	 */
	ret = ur_submit_and_wait(&q->ring, 0);
	return ret < 0 ? ret : 0;
}

int uq_fetch_unserved(struct ur_ring *r, int cdev_fd, uint16_t q_id,
		      uint32_t depth, uint64_t addr)
{
	int ret;

	for (uint32_t tag = 0; tag < depth; tag++) {
		const struct ublksrv_io_cmd cmd = {
			.q_id = q_id,
			.tag = (uint16_t)tag,
			.addr = addr,
		};

		ret = ur_prep_cmd(r, cdev_fd, UBLK_U_IO_FETCH_REQ, &cmd,
				  sizeof(cmd), tag);
		if (ret)
			return ret;
	}
	ret = ur_submit_and_wait(r, 0);
	if (ret < 0)
		return ret;
	return (uint32_t)ret == depth ? 0 : -EAGAIN;
}

/* -- batches --------------------------------------------------------------- */

static inline unsigned char *array_at(const struct uq_queue *q, uint32_t nr)
{
	return q->batch.elems + (size_t)nr * q->opt.depth * q->batch.elem_bytes;
}

static void batch_cmd(struct uq_queue *q, uint32_t cmd_op, uint32_t array)
{
	const struct ublk_batch_io cmd = {
		.q_id = q->opt.q_id,
		.flags = buffers_from_us(q) ? UBLK_BATCH_F_HAS_BUF_ADDR :
			 q->opt.data == UQ_AUTO_BUF ?
				UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK : 0,
		.nr_elem = (uint16_t)q->batch.sent[array],
		.elem_bytes = (uint8_t)q->batch.elem_bytes,
	};
	struct io_uring_sqe *sqe = new_sqe(q);

	sqe->opcode = IORING_OP_URING_CMD;
	sqe->cmd_op = cmd_op;
	sqe->addr = (uint64_t)(uintptr_t)array_at(q, array);
	sqe->user_data = user_data(FROM_BATCH_COMMIT, array);
	memcpy(sqe->cmd, &cmd, sizeof(cmd));
	/* It is executed while it is submitted. */
	q->expected++;
}

/* Sends the results that have come together, before the thread sleeps. */
void drv_send(struct uq_queue *q)
{
	struct uq_batch *b = &q->batch;
	uint16_t array = b->filling;
	unsigned int unused;

	if (!b->filled)
		return;
	unused = ~(b->busy | 1U << array) & ((1U << NR_ARRAYS) - 1);
	if (!unused)
		return; /* goes on when one of them comes back */
	b->busy |= (uint16_t)(1U << array);
	b->sent[array] = b->filled;
	b->filled = 0;
	b->filling = (uint16_t)__builtin_ctz(unused);
	b->next = array_at(q, b->filling);
	batch_cmd(q, UBLK_U_IO_COMMIT_IO_CMDS, array);
}

/* The driver says how many bytes of an array it has taken. */
void drv_committed(struct uq_queue *q, uint32_t array, int32_t res)
{
	struct uq_batch *b = &q->batch;
	size_t len = q->batch.elem_bytes;
	uint32_t taken;

	if (res <= 0) {
		q->failed = res ? res : -EPROTO;
		return;
	}
	taken = (uint32_t)res / (uint32_t)len;
	q->in_hand -= taken;
	b->sent[array] -= taken;
	if (!b->sent[array]) {
		b->busy &= (uint16_t)~(1U << array);
		return;
	}
	memmove(array_at(q, array), array_at(q, array) + taken * len,
		b->sent[array] * len);
	batch_cmd(q, UBLK_U_IO_COMMIT_IO_CMDS, array);
	q->expected--; /* it may fail, and be all that comes */
}

static inline uint16_t bid(const struct io_uring_cqe *cqe)
{
	return (uint16_t)(cqe->flags >> IORING_CQE_BUFFER_SHIFT);
}

static inline void give_buf(struct uq_queue *q, uint16_t nr)
{
	struct uq_batch *b = &q->batch;
	struct io_uring_buf *buf = &b->ring[b->ring_tail & (NR_FETCH_BUFS - 1)];

	buf->addr = (uint64_t)(uintptr_t)(b->tags + nr * FETCH_BUF_TAGS);
	buf->len = b->buf_tags * sizeof(*b->tags);
	buf->bid = nr;
	b->ring_tail++;
	/* Release: the entry is written before the kernel may take it. */
	__atomic_store_n(&b->ring[0].resv, b->ring_tail, __ATOMIC_RELEASE);
}

/* All that are with us. */
static void give_bufs(struct uq_queue *q)
{
	struct uq_batch *b = &q->batch;

	for (; b->taken; b->taken &= b->taken - 1)
		give_buf(q, (uint16_t)__builtin_ctz(b->taken));
}

/*
 * The driver keeps the fetches of a queue's threads in a list, and gives all to
 * the first of them until its buffers are used up: then it ends, with -ENOBUFS,
 * and a new one is the last. So a thread that is alone gives each buffer back at
 * once, and one that is not has buffers for its turn and no more, of one tag
 * each, until the driver has ended it. What is left then goes to the next one
 * when the new fetch is there, which therefore must not wait.
 */
static void fetch_batches(struct uq_queue *q)
{
	const struct ublk_batch_io cmd = {
		.q_id = q->opt.q_id,
		.nr_elem = FETCH_BUF_TAGS,
		.elem_bytes = sizeof(uint16_t),
	};
	struct io_uring_sqe *sqe = new_sqe(q);

	sqe->opcode = IORING_OP_URING_CMD;
	sqe->flags |= IOSQE_BUFFER_SELECT;
	sqe->cmd_op = UBLK_U_IO_FETCH_IO_CMDS;
	sqe->uring_cmd_flags = IORING_URING_CMD_MULTISHOT;
	sqe->buf_group = 0;
	sqe->user_data = user_data(FROM_BATCH_FETCH, 0);
	memcpy(sqe->cmd, &cmd, sizeof(cmd));
}

const uint16_t *drv_fetched(struct uq_queue *q, const struct io_uring_cqe *cqe,
			    uint32_t *nr)
{
	*nr = 0;
	if (cqe->res <= 0 || !(cqe->flags & IORING_CQE_F_BUFFER))
		return NULL;
	*nr = (uint32_t)cqe->res / sizeof(uint16_t);
	q->in_hand += *nr;
	return q->batch.tags + bid(cqe) * FETCH_BUF_TAGS;
}

void drv_fetch_again(struct uq_queue *q, const struct io_uring_cqe *cqe)
{
	if (cqe->flags & IORING_CQE_F_BUFFER)
		q->batch.taken |= 1U << bid(cqe);
	if (q->opt.threads == 1 || !(cqe->flags & IORING_CQE_F_MORE))
		give_bufs(q);
	if (cqe->flags & IORING_CQE_F_MORE)
		return;
	if (cqe->res >= 0 || cqe->res == -ENOBUFS)
		fetch_batches(q);
	else if (cqe->res == UBLK_IO_RES_ABORT)
		q->live = 0;
	else
		q->failed = cqe->res;
}

static int map_batch(struct uq_queue *q)
{
	struct uq_batch *b = &q->batch;
	size_t ring_len = NR_FETCH_BUFS * sizeof(struct io_uring_buf);
	size_t tags_len = NR_FETCH_BUFS * FETCH_BUF_TAGS * sizeof(uint16_t);
	void *m;

	/* An element without the address of a buffer is half as long. */
	b->elem_bytes = buffers_from_us(q) ?
				sizeof(struct ublk_elem) :
				offsetof(struct ublk_elem, buf_addr);
	b->elems = calloc((size_t)NR_ARRAYS * q->opt.depth, b->elem_bytes);
	if (!b->elems)
		return -ENOMEM;
	b->next = b->elems;
	b->ring_len = ring_len + tags_len;
	m = mmap(NULL, b->ring_len, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (m == MAP_FAILED)
		return -errno;
	b->ring = m;
	b->tags = (uint16_t *)((unsigned char *)m + ring_len);
	if (q->opt.threads == 1) {
		b->buf_tags = FETCH_BUF_TAGS;
		b->taken = UINT32_MAX;
	} else {
		uint32_t share = q->opt.depth / q->opt.threads;

		b->buf_tags = 1;
		b->taken = (1U << (share < TURN ? share : TURN)) - 1;
	}
	return madvise(m, b->ring_len, MADV_DONTFORK) ? -errno : 0;
}

/* Tells the driver all tags of the hardware queue and their buffers. */
static int announce_tags(struct uq_queue *q)
{
	struct uq_batch *b = &q->batch;
	int32_t res;
	int ret;

	for (uint16_t tag = 0; tag < q->opt.depth; tag++)
		drv_add_result(q, tag, 0);
	b->sent[0] = b->filled;
	b->filled = 0;
	b->next = b->elems;
	batch_cmd(q, UBLK_U_IO_PREP_IO_CMDS, 0);
	q->expected = 0;
	do {
		ret = ur_submit_and_wait(&q->ring, 1);
		if (ret < 0 && ret != -EINTR)
			return ret;
	} while (!ur_cq_ready(&q->ring));
	res = ur_cqe(&q->ring, 0)->res;
	ur_cq_advance(&q->ring, 1);
	return res < 0 ? res : 0;
}

/* The driver takes a fetch only after it was told the tags. */
static int start_batches(struct uq_queue *q)
{
	int ret = q->opt.thread ? 0 : announce_tags(q);

	if (ret)
		return ret;
	give_bufs(q);
	fetch_batches(q);
	q->live = 1;
	ret = ur_submit_and_wait(&q->ring, 0);
	return ret < 0 ? ret : 0;
}

/* -- either ---------------------------------------------------------------- */

int drv_init(struct uq_queue *q)
{
	int ret = 0;

	if (q->opt.batch) {
		ret = map_batch(q);
		if (!ret)
			ret = ur_register_buf_ring(&q->ring, q->batch.ring,
						   NR_FETCH_BUFS, 0);
	}
	if (!ret && q->opt.data >= UQ_ZERO_COPY)
		ret = ur_register_buffer_slots(&q->ring, q->opt.slots);
	return ret;
}

int drv_start(struct uq_queue *q)
{
	return q->opt.batch ? start_batches(q) : start_tags(q);
}

void drv_exit(struct uq_queue *q)
{
	if (q->batch.ring)
		munmap(q->batch.ring, q->batch.ring_len);
	free(q->batch.elems);
	q->batch.ring = NULL;
	q->batch.elems = NULL;
}
