/* SPDX-License-Identifier: MIT */
/*
 * The part of the io_uring ABI that ublkpy uses, with the kernel's names
 * (include/uapi/linux/io_uring.h). Declared here because the headers on build
 * machines are years behind the kernels that people run.
 */
#ifndef UBLKPY_IO_URING_H
#define UBLKPY_IO_URING_H

#include <stdint.h>

struct io_uring_sqe {
	uint8_t opcode;
	uint8_t flags;
	uint16_t ioprio;
	int32_t fd;
	union {
		uint64_t off;
		struct {
			uint32_t cmd_op;
			uint32_t __pad1;
		};
	};
	uint64_t addr;
	uint32_t len;
	union {
		uint32_t rw_flags;
		uint32_t fsync_flags;
		uint32_t poll32_events;	/* its halves in little-endian order */
		uint32_t cancel_flags;
		uint32_t uring_cmd_flags;
	};
	uint64_t user_data;
	union {
		uint16_t buf_index;
		uint16_t buf_group;
	};
	uint16_t personality;
	uint32_t file_index;
	union {
		struct {
			uint64_t addr3;
			uint64_t __pad2;
		};
		uint8_t cmd[16];	/* 80 bytes in a ring made with SQE128 */
	};
};

_Static_assert(sizeof(struct io_uring_sqe) == 64, "sqe is 64 bytes");

struct io_uring_cqe {
	uint64_t user_data;
	int32_t res;
	uint32_t flags;
};

/* include/uapi/linux/time_types.h */
struct __kernel_timespec {
	int64_t tv_sec;
	int64_t tv_nsec;
};

struct io_sqring_offsets {
	uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, resv1;
	uint64_t user_addr;
};

struct io_cqring_offsets {
	uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1;
	uint64_t user_addr;
};

struct io_uring_params {
	uint32_t sq_entries;
	uint32_t cq_entries;
	uint32_t flags;
	uint32_t sq_thread_cpu;
	uint32_t sq_thread_idle;
	uint32_t features;
	uint32_t wq_fd;
	uint32_t resv[3];
	struct io_sqring_offsets sq_off;
	struct io_cqring_offsets cq_off;
};

struct io_uring_rsrc_update {
	uint32_t offset;
	uint32_t resv;
	uint64_t data;
};

/* Entries of a ring of provided buffers; the tail is in the first one's resv. */
struct io_uring_buf {
	uint64_t addr;
	uint32_t len;
	uint16_t bid;
	uint16_t resv;
};

struct io_uring_buf_reg {
	uint64_t ring_addr;
	uint32_t ring_entries;
	uint16_t bgid;
	uint16_t flags;
	uint64_t resv[3];
};

struct io_uring_rsrc_register {
	uint32_t nr;
	uint32_t flags;
	uint64_t resv2;
	uint64_t data;
	uint64_t tags;
};

#define IORING_OFF_SQ_RING		0ULL
#define IORING_OFF_SQES			0x10000000ULL

#define IORING_SETUP_CQSIZE		(1U << 3)
#define IORING_SETUP_SUBMIT_ALL		(1U << 7)
#define IORING_SETUP_SQE128		(1U << 10)
#define IORING_SETUP_SINGLE_ISSUER	(1U << 12)
#define IORING_SETUP_DEFER_TASKRUN	(1U << 13)

#define IORING_FEAT_SINGLE_MMAP		(1U << 0)

#define IORING_ENTER_GETEVENTS		(1U << 0)
#define IORING_ENTER_REGISTERED_RING	(1U << 4)

#define IORING_REGISTER_FILES		2
#define IORING_REGISTER_EVENTFD		4
#define IORING_REGISTER_BUFFERS2	15
#define IORING_REGISTER_RING_FDS	20
#define IORING_REGISTER_PBUF_RING	22

#define IORING_RSRC_REGISTER_SPARSE	(1U << 0)

#define IORING_CQE_F_BUFFER		(1U << 0)
#define IORING_CQE_F_MORE		(1U << 1)
#define IORING_CQE_BUFFER_SHIFT		16

#define IOSQE_FIXED_FILE		(1U << 0)
#define IOSQE_IO_LINK			(1U << 2)
#define IOSQE_ASYNC			(1U << 4)
#define IOSQE_BUFFER_SELECT		(1U << 5)
#define IOSQE_CQE_SKIP_SUCCESS		(1U << 6)

#define IORING_URING_CMD_MULTISHOT	(1U << 1)

#define IORING_OP_NOP			0
#define IORING_OP_FSYNC			3
#define IORING_OP_READ_FIXED		4
#define IORING_OP_WRITE_FIXED		5
#define IORING_OP_POLL_ADD		6
#define IORING_OP_TIMEOUT		11
#define IORING_OP_ASYNC_CANCEL		14
#define IORING_OP_FALLOCATE		17
#define IORING_OP_READ			22
#define IORING_OP_WRITE			23
#define IORING_OP_URING_CMD		46

#define IORING_FSYNC_DATASYNC		(1U << 0)

/* include/uapi/linux/blkdev.h, Linux 6.12 */
#define BLOCK_URING_CMD_DISCARD		0x1200U

#endif
