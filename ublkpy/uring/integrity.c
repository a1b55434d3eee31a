// SPDX-License-Identifier: MIT
/*
 * The metadata of a request's blocks, moved at the same time as their data, by a
 * piece of its own for each tag (ublk_drv.c: UBLK_F_INTEGRITY). It comes from
 * the driver, and goes there, at the character device. It is kept in one file,
 * that of one interval of data after that of the other.
 *
 *   WRITE  driver ─▶ file       READ  file ─▶ driver
 *
 * Kept nowhere, that of a WRITE is forgotten, and a READ gets ones: the block
 * layer does not check a block whose tags have no other bits (block/t10-pi.c).
 */
#define _GNU_SOURCE
#include "engine.h"

#include <sys/mman.h>
#include <sys/uio.h>

/* So many go with these bytes of data. */
static inline uint64_t meta_bytes(const struct uq_queue *q, uint64_t data)
{
	return (data >> q->opt.metadata.interval_shift) * q->opt.metadata.bytes;
}

/* A buffer for each tag, or the ones that all of them give. */
static inline unsigned char *meta_buf(const struct uq_queue *q, uint16_t tag)
{
	if (q->opt.metadata.kind == UM_NULL)
		return q->meta_bufs;
	return q->meta_bufs + (size_t)tag * meta_bytes(q, q->opt.buf_bytes);
}

/* Between the character device and its buffer. */
static int32_t copy(const struct uq_queue *q, const struct uq_piece *p,
		    bool to_driver)
{
	return data_move(q->opt.cdev_fd, to_driver, meta_buf(q, p->tag), p->len,
			 data_pos(q, p->tag) | UBLKSRV_IO_INTEGRITY_FLAG, 0);
}

/* What is left of it, to or from the file. */
static void submit(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		   struct uq_piece *p)
{
	bool stores = iod_op(iod) == UBLK_IO_OP_WRITE;
	struct io_uring_sqe *sqe = new_sqe(q);

	sqe->opcode = stores ? IORING_OP_WRITE : IORING_OP_READ;
	sqe->addr = (uint64_t)(uintptr_t)(meta_buf(q, p->tag) + p->done);
	sqe->len = (uint32_t)(p->len - p->done);
	sqe->off = p->offset + p->done;
	sqe->user_data = user_data(FROM_METADATA, p->tag);
	name_file(q, p, sqe);
	if (stores && iod->op_flags & UBLK_IO_F_FUA)
		sqe->rw_flags = RWF_DSYNC;
}

int32_t meta_start(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		   uint16_t tag)
{
	const struct uq_metadata *metadata = &q->opt.metadata;
	bool stores = iod_op(iod) == UBLK_IO_OP_WRITE;
	struct uq_piece *p = &q->meta_pieces[tag];
	int32_t res;

	p->tag = tag;
	p->slot = metadata->slot;
	p->len = meta_bytes(q, iod_bytes(iod));
	p->offset = meta_bytes(q, iod->start_sector << SECTOR_SHIFT);
	if (metadata->kind != UM_FILE)
		return stores ? 0 : copy(q, p, true);
	res = stores ? copy(q, p, false) : 0;
	if (res)
		return res;
	begin_step(p, UQ_BACKING);
	q->ios[tag].pending++;
	submit(q, iod, p);
	return 0;
}

void meta_done(struct uq_queue *q, uint16_t tag, int32_t res)
{
	const struct ublksrv_io_desc *iod = iod_of(q, tag);
	struct uq_piece *p = &q->meta_pieces[tag];

	res = try_again(p, res) ? 0 : count(p, res);
	if (!res) {
		submit(q, iod, p);
		return;
	}
	if (res > 0)
		res = iod_op(iod) == UBLK_IO_OP_READ ? copy(q, p, true) : 0;
	p->step = UQ_IDLE;
	req_part_done(q, tag, res);
}

/* It may not follow a fork: see map_memory(). */
int meta_init(struct uq_queue *q)
{
	uint16_t bufs = q->opt.metadata.kind == UM_NULL ? 1 : q->opt.depth;
	size_t len = bufs * meta_bytes(q, q->opt.buf_bytes);
	void *m;

	if (!q->opt.metadata.bytes)
		return 0;
	q->meta_pieces = aligned_alloc(
		64, q->opt.depth * sizeof(*q->meta_pieces));
	if (!q->meta_pieces)
		return -ENOMEM;
	memset(q->meta_pieces, 0, q->opt.depth * sizeof(*q->meta_pieces));
	m = mmap(NULL, len, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (m == MAP_FAILED)
		return -errno;
	q->meta_bufs = m;
	q->meta_bufs_len = len;
	if (q->opt.metadata.kind == UM_NULL)
		memset(m, 0xff, len);
	return madvise(m, len, MADV_DONTFORK) ? -errno : 0;
}

/* Whether the kernel may yet write to the buffers: the queue was cut off. */
static bool is_busy(const struct uq_queue *q)
{
	for (uint32_t tag = 0; tag < q->opt.depth; tag++)
		if (q->meta_pieces[tag].step != UQ_IDLE)
			return true;
	return false;
}

/* Buffers that are in use stay mapped: see Memory.close(). */
void meta_exit(struct uq_queue *q)
{
	if (q->meta_bufs && !is_busy(q))
		munmap(q->meta_bufs, q->meta_bufs_len);
	free(q->meta_pieces);
	q->meta_bufs = NULL;
	q->meta_pieces = NULL;
}
