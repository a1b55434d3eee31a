/* SPDX-License-Identifier: MIT */
/*
 * The queue engine: serves one hardware queue of a ublk device in copy mode.
 *
 * For each tag it fetches a request, routes it to the backing (or answers it at
 * once), and commits the exact result, all on one io_uring. No Python runs, so
 * the caller's thread releases the GIL for as long as uq_run() lasts.
 *
 * A queue belongs to one thread: uq_init(), uq_run() and uq_exit() are called
 * by the thread that will serve it, because the driver accepts a COMMIT only
 * from the task that sent the FETCH.
 */
#ifndef UBLKPY_QUEUE_H
#define UBLKPY_QUEUE_H

#include <stddef.h>
#include <stdint.h>

#include "ring.h"
#include "ublk_cmd.h"

/* Where a device's bytes live. */
enum uq_route {
	UQ_NULL,	/* nowhere: each request succeeds, nothing is moved */
	UQ_LINEAR,	/* in one file or block device, from an offset on */
};

struct uq_map {
	uint32_t route;		/* enum uq_route */
	int fd;			/* borrowed: open for as long as the queue */
	uint64_t offset;	/* bytes from the start of fd */
	uint8_t is_block_device;
};

/* What uq_run() came back for, when it is not a negative errno. */
enum uq_event {
	UQ_STOPPED = 0,		/* the driver took all tags back */
	UQ_IO_ERROR = 1,	/* a request failed; call uq_run() again */
};

/* One request in our hands. */
struct uq_io {
	uint32_t done;		/* bytes of a READ or WRITE served so far */
	uint16_t mode;		/* fallocate mode of a WRITE_ZEROES in progress */
	uint16_t retries;
};

/*
 * Owner: the caller allocates it; uq_init() fills it and takes hold of a ring,
 * two mappings and ios; uq_exit() releases them. The fds stay the caller's.
 */
struct uq_queue {
	struct ur_ring ring;
	const struct ublksrv_io_desc *iods;	/* the driver's, read-only */
	size_t iods_len;
	unsigned char *bufs;			/* depth buffers of buf_bytes */
	size_t bufs_len;
	struct uq_io *ios;
	struct uq_map map;
	uint32_t buf_bytes;
	uint16_t q_id;
	uint16_t depth;
	uint32_t live;			/* tags not yet taken back */
	int32_t failed;			/* -errno of a refused ublk command */
	uint8_t report;			/* return UQ_IO_ERROR after this round */

	/* Read by the caller after UQ_IO_ERROR. */
	uint64_t errors;		/* requests failed so far */
	uint32_t error_op;		/* UBLK_IO_OP_* of the last one */
	int32_t error_res;		/* its -errno */
	uint64_t error_sector;
};

int uq_init(struct uq_queue *q, int cdev_fd, uint16_t q_id, uint16_t depth,
	    uint32_t buf_bytes, const struct uq_map *map);
int uq_run(struct uq_queue *q);
void uq_exit(struct uq_queue *q);

#endif
