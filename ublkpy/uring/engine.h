/* SPDX-License-Identifier: MIT */
/*
 * What the engine's files share. Everything runs on the queue's own thread.
 */
#ifndef UBLKPY_ENGINE_H
#define UBLKPY_ENGINE_H

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "queue.h"

#define SECTOR_SHIFT	9
#define MAX_RETRIES	64

/*
 * The ring's registered files: the character device, and as many of the map's
 * as it had when the queue was made and as there is room for. Others are named
 * by their descriptor.
 */
enum { CDEV_SLOT, FIRST_FILE_SLOT, MAX_FIXED = 63 };

/*
 * user_data: who completes in bits 32-39, and below the tag, the number of the
 * piece, or that of the commit array.
 */
enum uq_from {
	FROM_TAG,		/* FETCH or COMMIT of a tag */
	FROM_PIECE,
	FROM_BATCH_FETCH,
	FROM_BATCH_COMMIT,
	FROM_WAKE,		/* the eventfd */
	FROM_METADATA,		/* of a tag */
	FROM_FILE_OP,		/* of Python's, by its number */
	FROM_NOBODY,		/* seen only if it fails */
};

#define FROM_SHIFT	32

static inline uint64_t user_data(enum uq_from from, uint32_t nr)
{
	return (uint64_t)from << FROM_SHIFT | nr;
}

_Static_assert(sizeof(struct uq_piece) == 64, "a cache line each");

static inline uint64_t piece_data(const struct uq_queue *q,
				  const struct uq_piece *p)
{
	return user_data(FROM_PIECE, (uint32_t)(p - q->pieces));
}

static inline const struct ublksrv_io_desc *iod_of(const struct uq_queue *q,
						   uint16_t tag)
{
	return (const void *)(q->iods + (size_t)tag * q->opt.iod_bytes);
}

static inline uint32_t iod_op(const struct ublksrv_io_desc *iod)
{
	return iod->op_flags & 0xff;
}

static inline uint64_t iod_bytes(const struct ublksrv_io_desc *iod)
{
	return (uint64_t)iod->nr_sectors << SECTOR_SHIFT;
}

/* What the map says is good from here until look_away(). */
static inline void look_at_map(struct uq_queue *q)
{
	um_reader_enter(&q->reader);
	q->view = um_current(q->map);
}

static inline void look_away(struct uq_queue *q)
{
	q->view = NULL;
	um_reader_leave(&q->reader);
}

static inline bool moves_data(uint32_t op)
{
	return op <= UBLK_IO_OP_WRITE; /* or READ */
}

static inline bool is_zone_op(uint32_t op)
{
	return op >= UBLK_IO_OP_ZONE_OPEN;
}

/* Whether the backing reads and writes the client's pages. */
static inline bool in_place(const struct uq_io *io)
{
	return io->way >= UQ_REGISTERED;
}

static inline unsigned char *tag_buf(const struct uq_queue *q, uint16_t tag)
{
	return q->bufs + (size_t)tag * q->opt.buf_bytes;
}

/* Where the data of a piece is in our memory, if it is there. */
static inline unsigned char *piece_buf(const struct uq_queue *q,
				       const struct uq_piece *p)
{
	if (p->kind == UM_MEMORY)
		return (unsigned char *)(uintptr_t)p->offset;
	return q->ios[p->tag].buf + p->pos;
}

/* queue.c: for a full submission queue */
struct io_uring_sqe *make_room(struct uq_queue *q);

/* About the character device, all else zeros. */
static inline struct io_uring_sqe *new_sqe(struct uq_queue *q)
{
	struct io_uring_sqe *sqe = ur_get_sqe(&q->ring);

	if (__builtin_expect(!sqe, 0))
		sqe = make_room(q);
	memset(sqe, 0, sizeof(*sqe));
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->fd = CDEV_SLOT;
	return sqe;
}

/* A command to the driver about one tag. */
static inline struct io_uring_sqe *tag_cmd(struct uq_queue *q, uint32_t cmd_op,
					   uint16_t tag, int32_t result,
					   uint64_t addr)
{
	const struct ublksrv_io_cmd cmd = {
		.q_id = q->opt.q_id,
		.tag = tag,
		.result = result,
		.addr = addr,
	};
	struct io_uring_sqe *sqe = new_sqe(q);

	sqe->opcode = IORING_OP_URING_CMD;
	sqe->cmd_op = cmd_op;
	memcpy(sqe->cmd, &cmd, sizeof(cmd));
	return sqe;
}

/* READ or WRITE of what is left of a piece, between a file and our memory. */
static inline void prep_rw(const struct uq_queue *q, const struct uq_piece *p,
			   bool write, struct io_uring_sqe *sqe)
{
	sqe->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
	sqe->addr = (uint64_t)(uintptr_t)(piece_buf(q, p) + p->done);
	sqe->len = p->len - p->done;
}

/* The file of a piece, with the ring or by its descriptor. */
static inline void name_file(const struct uq_queue *q, const struct uq_piece *p,
			     struct io_uring_sqe *sqe)
{
	if (p->slot < q->nr_fixed) {
		sqe->fd = FIRST_FILE_SLOT + p->slot;
	} else {
		sqe->fd = q->view->files[p->slot].fd;
		sqe->flags = 0;
	}
}

/* Where the data of a request begins in the character device. */
static inline uint64_t data_pos(const struct uq_queue *q, uint16_t tag)
{
	return UBLKSRV_IO_BUF_OFFSET +
	       ((uint64_t)q->opt.q_id << UBLK_QID_OFF) +
	       ((uint64_t)tag << UBLK_TAG_OFF);
}

static inline void begin_step(struct uq_piece *p, enum uq_step step)
{
	p->step = (uint8_t)step;
	p->done = 0;
	p->retries = 0;
	p->mode = 0;
}

/* Whether to send it once more after this result. */
static inline bool try_again(struct uq_piece *p, int32_t res)
{
	return (res == -EINTR || res == -EAGAIN) && p->retries++ < MAX_RETRIES;
}

/* Its result: 1 when all of it is there now, 0 when not yet, or -errno. */
static inline int32_t count(struct uq_piece *p, int32_t res)
{
	/* No progress: the file ends before the device does. */
	if (!res)
		return -EIO;
	if (res < 0)
		return res;
	p->done += (uint32_t)res;
	return p->done == p->len;
}

/* driver.c: how requests come and results go */

int drv_init(struct uq_queue *q);
int drv_start(struct uq_queue *q);
void drv_exit(struct uq_queue *q);

/* A FETCH or COMMIT is done: whether it brought a request. */
bool drv_tag_done(struct uq_queue *q, int32_t res);

/* A batch of requests: their tags, valid until drv_fetch_again(). */
const uint16_t *drv_fetched(struct uq_queue *q, const struct io_uring_cqe *cqe,
			    uint32_t *nr);
void drv_fetch_again(struct uq_queue *q, const struct io_uring_cqe *cqe);

/* Hands results back that have come together. */
void drv_send(struct uq_queue *q);
/* Hands one back, and asks for a request on this tag. */
void drv_fetch_tag(struct uq_queue *q, uint32_t cmd_op, uint16_t tag,
		   int32_t res);

/* One for the next drv_send(). */
static inline void drv_add_result(struct uq_queue *q, uint16_t tag, int32_t res)
{
	struct uq_batch *b = &q->batch;
	const uint64_t head = (uint64_t)(uint32_t)res << 32 |
			      (uint64_t)tag << 16 | tag;
	const uint64_t addr = (uint64_t)(uintptr_t)tag_buf(q, tag);

	memcpy(b->next, &head, sizeof(head));
	if (b->elem_bytes > sizeof(head))
		memcpy(b->next + sizeof(head), &addr, sizeof(addr));
	b->next += b->elem_bytes;
	b->filled++;
}

/* Hands a request back with its result. */
static inline void drv_commit(struct uq_queue *q, uint16_t tag, int32_t res)
{
	if (q->opt.batch)
		drv_add_result(q, tag, res);
	else
		drv_fetch_tag(q, UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, res);
}

/* A batch of results is done: how many bytes of it the driver took, or -errno. */
void drv_committed(struct uq_queue *q, uint32_t array, int32_t res);

/* data.c: how the data travels between the driver and us */

/* Where the data of a READ or WRITE is when it arrives, in this mode: enum uq_way. */
uint8_t data_usual_way(enum uq_data data);
/* And that of this one, which may also be told where, or that it fails. */
uint8_t data_unusual_way(const struct uq_queue *q,
			 const struct ublksrv_io_desc *iod, struct uq_io *io);
static inline uint8_t data_way(const struct uq_queue *q,
			       const struct ublksrv_io_desc *iod,
			       struct uq_io *io)
{
	if (__builtin_expect(iod->op_flags & (UBLK_IO_F_NEED_REG_BUF |
					      UBLK_IO_F_SHMEM_ZC), 0))
		return data_unusual_way(q, iod, io);
	return q->way;
}

/* A WRITE's, which the driver offers, to the request's buffer. */
void data_get(struct uq_queue *q, uint16_t tag);
/*
 * All of it between memory of ours and a file that makes nobody wait, with flags
 * of pwritev2() for a write: 0, or -errno.
 */
int32_t data_move(int fd, bool write, void *buf, uint64_t len, uint64_t off,
		  int rw_flags);

/* A piece's, between the character device and where it is with us. */
static inline int32_t data_copy(const struct uq_queue *q,
				const struct uq_piece *p, bool to_driver)
{
	return data_move(q->opt.cdev_fd, to_driver, piece_buf(q, p), p->len,
			 data_pos(q, p->tag) + p->pos, 0);
}

/* Whether it has to be copied between the driver and our memory, and by us. */
static inline bool copies(const struct uq_queue *q, const struct uq_piece *p)
{
	const struct uq_io *io = &q->ios[p->tag];

	return io->way == UQ_COPIED ||
	       (io->way > UQ_COPIED && p->kind != UM_FILE);
}

/* The data of a WRITE, before anything is done about it: 0, or -errno. */
static inline int32_t data_in(const struct uq_queue *q,
			      const struct ublksrv_io_desc *iod,
			      const struct uq_piece *p)
{
	return iod_op(iod) == UBLK_IO_OP_WRITE && copies(q, p) ?
		       data_copy(q, p, false) : 0;
}

/* That of a READ, when it is here. */
static inline int32_t data_out(const struct uq_queue *q,
			       const struct ublksrv_io_desc *iod,
			       const struct uq_piece *p)
{
	return iod_op(iod) == UBLK_IO_OP_READ && copies(q, p) ?
		       data_copy(q, p, true) : 0;
}

void data_register(struct uq_queue *q, uint16_t tag);
void data_unregister(struct uq_queue *q, uint16_t tag);

/* pattern.c: each 8 bytes hold their offset */

/* What comes of a piece in such a place: 0, or -errno, for a WRITE of others EIO. */
int32_t pattern_serve(const struct uq_queue *q,
		      const struct ublksrv_io_desc *iod,
		      const struct uq_piece *p);

/* shmem.c: the way of a request whose data is in memory that a client shares */
uint8_t shm_way(const struct uq_queue *q, const struct ublksrv_io_desc *iod,
		struct uq_io *io);

/* backing.c: the op of a piece at the file behind it */

/*
 * READ or WRITE of a file in memory, which a thread of io_uring only delays: 0,
 * or -errno.
 */
int32_t back_at_once(const struct uq_queue *q,
		     const struct ublksrv_io_desc *iod,
		     const struct uq_piece *p);
/* What is left of it. */
void back_submit(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		 struct uq_piece *p);
/* After a result: 1 when it is done, 0 when more of it was sent, or -errno. */
int32_t back_done(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		  struct uq_piece *p, int32_t res);

/* integrity.c: the metadata of a request, beside its data */

int meta_init(struct uq_queue *q);
void meta_exit(struct uq_queue *q);
/*
 * Of a READ or WRITE that has some: 0, or -errno. If it is in a file,
 * req_part_done() follows.
 */
int32_t meta_start(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		   uint16_t tag);
void meta_done(struct uq_queue *q, uint16_t tag, int32_t res);

/* request.c: what becomes of a request between fetch and commit */

void req_start(struct uq_queue *q, uint16_t tag, bool wants_data);
/* What is no piece of the data has ended: 0 or -errno. */
void req_part_done(struct uq_queue *q, uint16_t tag, int32_t res);
void req_piece_done(struct uq_queue *q, uint32_t nr, int32_t res);
void req_answered(struct uq_queue *q, struct uq_piece *p, int32_t res);
void req_retry(struct uq_queue *q, struct uq_piece *p);

/* fault.c: what befalls a request where the map says so */

/*
 * At the place that was just looked up, with that error: whether the piece goes
 * on now (0), after a delay (1), or not at all (-errno).
 */
int32_t fault_befall(struct uq_queue *q, struct uq_piece *p, int32_t error);

/* place.c: where the bytes live */

/* Of the next ones of a piece; its error as in struct um_hit. */
int32_t place_find(const struct uq_queue *q, const struct ublksrv_io_desc *iod,
		   struct uq_piece *p);

/* zone.c: zones, which are all Python's */

/* What a zone operation is about: 0, or -errno. The data of an append comes. */
int32_t zone_begin(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		   struct uq_piece *p);
/* Python has done it: 0, or -errno. A report goes. */
int32_t zone_answered(const struct uq_queue *q,
		      const struct ublksrv_io_desc *iod,
		      const struct uq_piece *p);
int32_t zone_result(const struct uq_queue *q, const struct ublksrv_io_desc *iod);

/* upcall.c: what Python is asked, and what it says */

/* The list of asked pieces, as Python gets it. */
void up_ask(struct uq_queue *q);
/* What it has said since. */
void up_take_results(struct uq_queue *q);

/* file_op.c: what Python does with files of its own */

void file_op_done(struct uq_queue *q, uint32_t id, int32_t res);

/* drain.c: who waits until what is on its way in a range is through (um_drain()) */

/* Has the ring say when somebody comes. */
void drain_listen(struct uq_queue *q);
void drain_begin(struct uq_queue *q);
/* A piece that drains has left its place. */
void drain_leave(struct uq_queue *q, struct uq_piece *p);
/* Once none is left. */
void drain_end(struct uq_queue *q);

#endif
