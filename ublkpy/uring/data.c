// SPDX-License-Identifier: MIT
/*
 * Where the data of a request is, and how it gets from the driver into our
 * memory and back (ublk_drv.c: UBLK_F_NEED_GET_DATA, _USER_COPY,
 * _SUPPORT_ZERO_COPY, _AUTO_BUF_REG).
 */
#define _GNU_SOURCE
#include "engine.h"

#include <sys/uio.h>
#include <unistd.h>

uint8_t data_usual_way(enum uq_data data)
{
	switch (data) {
	case UQ_USER_COPY:
		return UQ_COPIED;
	case UQ_ZERO_COPY:
		return UQ_UNREGISTERED;
	case UQ_AUTO_BUF:
		return UQ_REGISTERED_BY_DRIVER;
	default:
		return UQ_IN_BUFFER;
	}
}

uint8_t data_unusual_way(const struct uq_queue *q,
			 const struct ublksrv_io_desc *iod, struct uq_io *io)
{
	if (iod->op_flags & UBLK_IO_F_SHMEM_ZC)
		return shm_way(q, iod, io);
	return UQ_COPIED; /* UQ_AUTO_BUF without a place for a buffer */
}

void data_get(struct uq_queue *q, uint16_t tag)
{
	struct io_uring_sqe *sqe;

	q->pieces[tag].step = UQ_GET;
	sqe = tag_cmd(q, UBLK_U_IO_NEED_GET_DATA, tag, 0,
		      (uint64_t)(uintptr_t)q->ios[tag].buf);
	sqe->user_data = piece_data(q, &q->pieces[tag]);
}

int32_t data_move(int fd, bool write, void *buf, uint64_t len, uint64_t off,
		  int rw_flags)
{
	while (len) {
		const struct iovec data = { buf, len };
		off_t at = (off_t)off;
		ssize_t n;

		if (rw_flags)
			n = pwritev2(fd, &data, 1, at, rw_flags);
		else
			n = write ? pwrite(fd, buf, len, at) :
				    pread(fd, buf, len, at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -EIO;
		buf = (unsigned char *)buf + n;
		len -= (uint64_t)n;
		off += (uint64_t)n;
	}
	return 0;
}

/* Executed while it is submitted, and so before what follows it uses it. */
static void pages_cmd(struct uq_queue *q, uint32_t cmd_op, uint16_t tag)
{
	struct io_uring_sqe *sqe = tag_cmd(q, cmd_op, tag, 0, tag);

	sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
	sqe->user_data = user_data(FROM_NOBODY, 0);
}

void data_register(struct uq_queue *q, uint16_t tag)
{
	pages_cmd(q, UBLK_U_IO_REGISTER_IO_BUF, tag);
	q->ios[tag].way = UQ_REGISTERED;
}

void data_unregister(struct uq_queue *q, uint16_t tag)
{
	pages_cmd(q, UBLK_U_IO_UNREGISTER_IO_BUF, tag);
}
