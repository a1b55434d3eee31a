// SPDX-License-Identifier: MIT
/*
 * Operations on zones (ublk_drv.c: UBLK_F_ZONED). The map has no part in them:
 * Python answers them all. Their data is copied by us, in every mode that the
 * driver has for them.
 */
#define _GNU_SOURCE
#include "engine.h"

/* struct blk_zone (linux/blkzoned.h) */
#define ZONE_BYTES	64

int32_t zone_begin(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		   struct uq_piece *p)
{
	switch (iod_op(iod)) {
	case UBLK_IO_OP_ZONE_APPEND:
		p->end = (uint32_t)iod_bytes(iod);
		break;
	case UBLK_IO_OP_REPORT_ZONES:
		if (iod->nr_sectors > UINT32_MAX / ZONE_BYTES)
			return -EIO;
		p->end = iod->nr_sectors * ZONE_BYTES;
		break;
	case UBLK_IO_OP_ZONE_OPEN:
	case UBLK_IO_OP_ZONE_CLOSE:
	case UBLK_IO_OP_ZONE_FINISH:
	case UBLK_IO_OP_ZONE_RESET:
	case UBLK_IO_OP_ZONE_RESET_ALL:
		p->end = 0;
		break;
	default:
		p->end = 0;
		return -EOPNOTSUPP;
	}
	p->len = p->end;
	p->kind = UM_UPCALL;
	if (p->end > q->opt.buf_bytes)
		return -EIO;
	if (iod_op(iod) == UBLK_IO_OP_ZONE_APPEND)
		return data_copy(q, p, false);
	/* What Python leaves out of a report is not what was here before. */
	memset(piece_buf(q, p), 0, p->len);
	return 0;
}

int32_t zone_answered(const struct uq_queue *q,
		      const struct ublksrv_io_desc *iod,
		      const struct uq_piece *p)
{
	return iod_op(iod) == UBLK_IO_OP_REPORT_ZONES ? data_copy(q, p, true) : 0;
}

/*
 * Up to Linux 7.2, a report that is shorter than the driver's buffer, whose
 * length we do not know, is asked for again.
 */
int32_t zone_result(const struct uq_queue *q, const struct ublksrv_io_desc *iod)
{
	switch (iod_op(iod)) {
	case UBLK_IO_OP_ZONE_APPEND:
		return (int32_t)iod_bytes(iod);
	case UBLK_IO_OP_REPORT_ZONES:
		return (int32_t)q->opt.buf_bytes;
	default:
		return 0;
	}
}

void uq_appended(struct uq_queue *q, uint32_t piece, uint64_t pos)
{
	q->ios[q->pieces[piece].tag].append_sector = pos >> SECTOR_SHIFT;
}
