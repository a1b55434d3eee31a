// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "queue.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SECTOR_SHIFT	9
#define MAX_RETRIES	64

/* Slots of the ring's registered files. */
enum { CDEV_SLOT, BACKING_SLOT, NR_SLOTS };

/* user_data: the tag in bits 0-15, who completes in bit 16. */
enum { FROM_DRIVER = 0 << 16, FROM_BACKING = 1 << 16 };

#define PUNCH		(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define ZERO		(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

static inline uint32_t iod_op(const struct ublksrv_io_desc *iod)
{
	return iod->op_flags & 0xff;
}

static inline uint64_t iod_bytes(const struct ublksrv_io_desc *iod)
{
	return (uint64_t)iod->nr_sectors << SECTOR_SHIFT;
}

static inline bool moves_data(uint32_t op)
{
	return op == UBLK_IO_OP_READ || op == UBLK_IO_OP_WRITE;
}

static inline unsigned char *tag_buf(const struct uq_queue *q, uint16_t tag)
{
	return q->bufs + (size_t)tag * q->buf_bytes;
}

/*
 * Never NULL: the submission queue has a slot for each tag, and a tag whose SQE
 * waits there gets no completion that could ask for another. If that is wrong,
 * better no daemon, which can be recovered, than a request that is lost.
 */
static inline struct io_uring_sqe *new_sqe(struct uq_queue *q)
{
	struct io_uring_sqe *sqe = ur_get_sqe(&q->ring);

	if (!sqe)
		abort();
	memset(sqe, 0, sizeof(*sqe));
	sqe->flags = IOSQE_FIXED_FILE;
	return sqe;
}

static inline void ublk_cmd(struct uq_queue *q, uint32_t cmd_op, uint16_t tag,
			    int32_t result)
{
	const struct ublksrv_io_cmd cmd = {
		.q_id = q->q_id,
		.tag = tag,
		.result = result,
		.addr = (uint64_t)(uintptr_t)tag_buf(q, tag),
	};
	struct io_uring_sqe *sqe = new_sqe(q);

	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = CDEV_SLOT;
	sqe->cmd_op = cmd_op;
	sqe->user_data = FROM_DRIVER | tag;
	memcpy(sqe->cmd, &cmd, sizeof(cmd));
}

/*
 * The only place where results are made. A short count would be taken for
 * success by Linux 7.3, so it is all bytes or an errno; ops without data
 * answer 0.
 */
static inline void commit(struct uq_queue *q, uint16_t tag)
{
	const struct ublksrv_io_desc *iod = &q->iods[tag];
	int32_t res = moves_data(iod_op(iod)) ? (int32_t)iod_bytes(iod) : 0;

	ublk_cmd(q, UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, res);
}

static void commit_error(struct uq_queue *q, uint16_t tag, int32_t res)
{
	const struct ublksrv_io_desc *iod = &q->iods[tag];

	q->errors++;
	q->error_op = iod_op(iod);
	q->error_res = res;
	q->error_sector = iod->start_sector;
	/* The 1st, 2nd, 4th, 8th ...: a failing disk must not flood the log. */
	if (!(q->errors & (q->errors - 1)))
		q->report = true;
	ublk_cmd(q, UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, res);
}

static void prep_fallocate(struct io_uring_sqe *sqe, uint64_t start,
			   uint64_t len, uint32_t mode)
{
	sqe->opcode = IORING_OP_FALLOCATE;
	sqe->off = start;
	sqe->addr = len;
	sqe->len = mode;
}

static void prep_discard(const struct uq_queue *q, struct io_uring_sqe *sqe,
			 uint64_t start, uint64_t len)
{
	if (!q->map.is_block_device) {
		prep_fallocate(sqe, start, len, PUNCH);
		return;
	}
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->cmd_op = BLOCK_URING_CMD_DISCARD;
	sqe->addr = start;
	sqe->addr3 = len;
}

/* Sends what is left of a tag's request to the backing. */
static void submit_backing(struct uq_queue *q, uint16_t tag)
{
	const struct ublksrv_io_desc *iod = &q->iods[tag];
	uint64_t start = q->map.offset + (iod->start_sector << SECTOR_SHIFT);
	uint64_t len = iod_bytes(iod);
	const struct uq_io *io = &q->ios[tag];
	struct io_uring_sqe *sqe = new_sqe(q);

	sqe->fd = BACKING_SLOT;
	sqe->user_data = FROM_BACKING | tag;
	switch (iod_op(iod)) {
	case UBLK_IO_OP_WRITE:
		if (iod->op_flags & UBLK_IO_F_FUA)
			sqe->rw_flags = RWF_DSYNC;
		/* fall through */
	case UBLK_IO_OP_READ:
		sqe->opcode = iod_op(iod) == UBLK_IO_OP_READ ?
			      IORING_OP_READ : IORING_OP_WRITE;
		sqe->off = start + io->done;
		sqe->addr = (uint64_t)(uintptr_t)(tag_buf(q, tag) + io->done);
		sqe->len = (uint32_t)len - io->done;
		break;
	case UBLK_IO_OP_FLUSH:
		sqe->opcode = IORING_OP_FSYNC;
		sqe->fsync_flags = IORING_FSYNC_DATASYNC;
		break;
	case UBLK_IO_OP_DISCARD:
		prep_discard(q, sqe, start, len);
		break;
	default: /* WRITE_ZEROES */
		prep_fallocate(sqe, start, len, io->mode);
	}
}

/* A new request has arrived on a tag. */
static void serve(struct uq_queue *q, uint16_t tag)
{
	const struct ublksrv_io_desc *iod = &q->iods[tag];
	struct uq_io *io = &q->ios[tag];

	switch (iod_op(iod)) {
	case UBLK_IO_OP_READ:
	case UBLK_IO_OP_WRITE:
		if (iod_bytes(iod) > q->buf_bytes) {
			commit_error(q, tag, -EIO);
			return;
		}
		break;
	case UBLK_IO_OP_FLUSH:
	case UBLK_IO_OP_DISCARD:
		break;
	case UBLK_IO_OP_WRITE_ZEROES:
		io->mode = iod->op_flags & UBLK_IO_F_NOUNMAP ? ZERO : PUNCH;
		break;
	default:
		commit_error(q, tag, -EOPNOTSUPP);
		return;
	}
	if (q->map.route == UQ_NULL) {
		commit(q, tag);
		return;
	}
	io->done = 0;
	io->retries = 0;
	submit_backing(q, tag);
}

/*
 * The next fallocate mode that a WRITE_ZEROES needs after this result, or 0.
 * Zeroes that may be unmapped: punch, else write them. Zeroes that must stay
 * allocated: write them, else punch and allocate again.
 */
static uint16_t next_zero_mode(const struct ublksrv_io_desc *iod, uint16_t mode,
			       int32_t res)
{
	bool nounmap = iod->op_flags & UBLK_IO_F_NOUNMAP;

	if (res == -EOPNOTSUPP && mode == (nounmap ? ZERO : PUNCH))
		return nounmap ? PUNCH : ZERO;
	if (!res && nounmap && mode == PUNCH)
		return ALLOCATE;
	return 0;
}

/* The backing has answered. */
static void backing_done(struct uq_queue *q, uint16_t tag, int32_t res)
{
	const struct ublksrv_io_desc *iod = &q->iods[tag];
	uint32_t op = iod_op(iod);
	struct uq_io *io = &q->ios[tag];

	if ((res == -EINTR || res == -EAGAIN) && io->retries < MAX_RETRIES) {
		io->retries++;
		submit_backing(q, tag);
		return;
	}
	if (op == UBLK_IO_OP_WRITE_ZEROES) {
		uint16_t mode = next_zero_mode(iod, io->mode, res);

		if (mode) {
			io->mode = mode;
			submit_backing(q, tag);
			return;
		}
	}
	/* No progress: the file ends before the device does. */
	if (!res && moves_data(op))
		res = -EIO;
	if (res < 0) {
		commit_error(q, tag, res);
		return;
	}
	if (moves_data(op)) {
		io->done += (uint32_t)res;
		if (io->done < iod_bytes(iod)) {
			submit_backing(q, tag);
			return;
		}
	}
	commit(q, tag);
}

static void handle_cqe(struct uq_queue *q, const struct io_uring_cqe *cqe)
{
	uint16_t tag = (uint16_t)cqe->user_data;

	if (cqe->user_data & FROM_BACKING)
		backing_done(q, tag, cqe->res);
	else if (cqe->res == UBLK_IO_RES_OK)
		serve(q, tag);
	else if (cqe->res == UBLK_IO_RES_ABORT)
		q->live--;
	else
		q->failed = cqe->res < 0 ? cqe->res : -EPROTO;
}

int uq_run(struct uq_queue *q)
{
	const struct timespec pause = { .tv_nsec = 1000000 };

	while (q->live) {
		int ret = ur_submit_and_wait(&q->ring, 1);
		unsigned int nr = ur_cq_ready(&q->ring);

		if (ret < 0 && ret != -EINTR && ret != -EAGAIN && ret != -EBUSY)
			return ret;
		/* No memory for a request just now: let some come back. */
		if (ret == -EAGAIN && !nr)
			nanosleep(&pause, NULL);
		for (unsigned int i = 0; i < nr; i++)
			handle_cqe(q, ur_cqe(&q->ring, i));
		ur_cq_advance(&q->ring, nr);
		if (q->failed)
			return q->failed;
		if (q->report) {
			q->report = false;
			return UQ_IO_ERROR;
		}
	}
	return UQ_STOPPED;
}

static size_t round_up_page(size_t n)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return (n + page - 1) / page * page;
}

/* Neither mapping may follow a fork: a child would pin the device. */
static int map_memory(struct uq_queue *q, int cdev_fd)
{
	size_t stride = round_up_page(UBLK_MAX_QUEUE_DEPTH *
				      sizeof(struct ublksrv_io_desc));
	size_t len = round_up_page(q->depth * sizeof(struct ublksrv_io_desc));
	void *m;

	m = mmap(NULL, len, PROT_READ, MAP_SHARED | MAP_POPULATE, cdev_fd,
		 (off_t)(q->q_id * stride));
	if (m == MAP_FAILED)
		return -errno;
	q->iods = m;
	q->iods_len = len;
	if (madvise(m, len, MADV_DONTFORK))
		return -errno;

	len = (size_t)q->depth * q->buf_bytes;
	m = mmap(NULL, len, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (m == MAP_FAILED)
		return -errno;
	q->bufs = m;
	q->bufs_len = len;
	if (madvise(m, len, MADV_DONTFORK))
		return -errno;
	q->ios = calloc(q->depth, sizeof(*q->ios));
	return q->ios ? 0 : -ENOMEM;
}

static int init_ring(struct uq_queue *q, int cdev_fd)
{
	int fds[NR_SLOTS] = {
		[CDEV_SLOT] = cdev_fd,
		[BACKING_SLOT] = q->map.route == UQ_LINEAR ? q->map.fd : -1,
	};
	int ret;

	ret = ur_ring_init(&q->ring, q->depth,
			   IORING_SETUP_SINGLE_ISSUER |
			   IORING_SETUP_DEFER_TASKRUN |
			   IORING_SETUP_SUBMIT_ALL);
	if (ret)
		return ret;
	ret = ur_register_files(&q->ring, fds, NR_SLOTS);
	if (ret)
		return ret;
	return ur_register_ring_fd(&q->ring);
}

int uq_init(struct uq_queue *q, int cdev_fd, uint16_t q_id, uint16_t depth,
	    uint32_t buf_bytes, const struct uq_map *map)
{
	int ret;

	memset(q, 0, sizeof(*q));
	q->ring.fd = -1;
	q->q_id = q_id;
	q->depth = depth;
	q->buf_bytes = buf_bytes;
	q->map = *map;
	ret = map_memory(q, cdev_fd);
	if (!ret)
		ret = init_ring(q, cdev_fd);
	if (ret) {
		uq_exit(q);
		return ret;
	}
	for (uint16_t tag = 0; tag < depth; tag++)
		ublk_cmd(q, UBLK_U_IO_FETCH_REQ, tag, 0);
	q->live = depth;
	/*
	 * All at once: 6.12 cannot cancel a queue of which it has seen only
	 * some of the tags.
	 */
	ret = ur_submit_and_wait(&q->ring, 0);
	if (ret < 0) {
		uq_exit(q);
		return ret;
	}
	return 0;
}

void uq_exit(struct uq_queue *q)
{
	ur_ring_exit(&q->ring);
	if (q->iods)
		munmap((void *)(uintptr_t)q->iods, q->iods_len);
	if (q->bufs)
		munmap(q->bufs, q->bufs_len);
	free(q->ios);
	q->iods = NULL;
	q->bufs = NULL;
	q->ios = NULL;
}
