/* SPDX-License-Identifier: MIT */
/*
 * The ublk driver's ABI (include/uapi/linux/ublk_cmd.h up to Linux 7.3), with
 * the kernel's names. Sectors are always 512 bytes.
 */
#ifndef UBLKPY_UBLK_CMD_H
#define UBLKPY_UBLK_CMD_H

#include <stdint.h>

/* Control commands on /dev/ublk-control: _IOR/_IOWR('u', nr, 32 bytes) */
#define UBLK_U_CMD_GET_QUEUE_AFFINITY	0x80207501U
#define UBLK_U_CMD_GET_DEV_INFO		0x80207502U
#define UBLK_U_CMD_GET_DEV_INFO2	0x80207512U
#define UBLK_U_CMD_ADD_DEV		0xc0207504U
#define UBLK_U_CMD_DEL_DEV		0xc0207505U
#define UBLK_U_CMD_START_DEV		0xc0207506U
#define UBLK_U_CMD_STOP_DEV		0xc0207507U
#define UBLK_U_CMD_SET_PARAMS		0xc0207508U
#define UBLK_U_CMD_GET_PARAMS		0x80207509U
#define UBLK_U_CMD_START_USER_RECOVERY	0xc0207510U
#define UBLK_U_CMD_END_USER_RECOVERY	0xc0207511U
#define UBLK_U_CMD_GET_FEATURES		0x80207513U
#define UBLK_U_CMD_DEL_DEV_ASYNC	0x80207514U
#define UBLK_U_CMD_UPDATE_SIZE		0xc0207515U
#define UBLK_U_CMD_QUIESCE_DEV		0xc0207516U
#define UBLK_U_CMD_TRY_STOP_DEV		0xc0207517U
#define UBLK_U_CMD_REG_BUF		0xc0207518U
#define UBLK_U_CMD_UNREG_BUF		0xc0207519U

/* I/O commands on /dev/ublkcN: _IOWR('u', nr, 16 bytes) */
#define UBLK_U_IO_FETCH_REQ		0xc0107520U
#define UBLK_U_IO_COMMIT_AND_FETCH_REQ	0xc0107521U
#define UBLK_U_IO_NEED_GET_DATA		0xc0107522U
#define UBLK_U_IO_REGISTER_IO_BUF	0xc0107523U
#define UBLK_U_IO_UNREGISTER_IO_BUF	0xc0107524U
#define UBLK_U_IO_PREP_IO_CMDS		0xc0107525U
#define UBLK_U_IO_COMMIT_IO_CMDS	0xc0107526U
#define UBLK_U_IO_FETCH_IO_CMDS		0xc0107527U

/* in ublk_batch_io.flags */
#define UBLK_BATCH_F_HAS_BUF_ADDR	(1U << 1)
#define UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK	(1U << 2)

/* in the descriptor that sqe.addr holds with AUTO_BUF_REG, above the index */
#define UBLK_AUTO_BUF_REG_FALLBACK	(1U << 0)

/* where a request's data lies in the character device, with USER_COPY */
#define UBLKSRV_IO_BUF_OFFSET		0x80000000ULL
#define UBLK_TAG_OFF			25
#define UBLK_QID_OFF			41
/* that of its metadata, with INTEGRITY: in bytes of metadata */
#define UBLKSRV_IO_INTEGRITY_FLAG	(1ULL << 62)

#define UBLK_IO_RES_OK			0
#define UBLK_IO_RES_NEED_GET_DATA	1
#define UBLK_IO_RES_ABORT		(-19)	/* -ENODEV */

#define UBLK_F_SUPPORT_ZERO_COPY	(1ULL << 0)
#define UBLK_F_URING_CMD_COMP_IN_TASK	(1ULL << 1)
#define UBLK_F_NEED_GET_DATA		(1ULL << 2)
#define UBLK_F_USER_RECOVERY		(1ULL << 3)
#define UBLK_F_USER_RECOVERY_REISSUE	(1ULL << 4)
#define UBLK_F_UNPRIVILEGED_DEV		(1ULL << 5)
#define UBLK_F_CMD_IOCTL_ENCODE		(1ULL << 6)
#define UBLK_F_USER_COPY		(1ULL << 7)
#define UBLK_F_ZONED			(1ULL << 8)
#define UBLK_F_USER_RECOVERY_FAIL_IO	(1ULL << 9)
#define UBLK_F_UPDATE_SIZE		(1ULL << 10)
#define UBLK_F_AUTO_BUF_REG		(1ULL << 11)
#define UBLK_F_QUIESCE			(1ULL << 12)
#define UBLK_F_PER_IO_DAEMON		(1ULL << 13)
#define UBLK_F_BUF_REG_OFF_DAEMON	(1ULL << 14)
#define UBLK_F_BATCH_IO			(1ULL << 15)
#define UBLK_F_INTEGRITY		(1ULL << 16)
#define UBLK_F_SAFE_STOP_DEV		(1ULL << 17)
#define UBLK_F_NO_AUTO_PART_SCAN	(1ULL << 18)
#define UBLK_F_SHMEM_ZC			(1ULL << 19)
#define UBLK_F_IO_DESC_SIZE		(1ULL << 20)

#define UBLK_S_DEV_DEAD			0
#define UBLK_S_DEV_LIVE			1
#define UBLK_S_DEV_QUIESCED		2
#define UBLK_S_DEV_FAIL_IO		3

#define UBLK_MAX_QUEUE_DEPTH		4096

#define UBLK_IO_OP_READ			0
#define UBLK_IO_OP_WRITE		1
#define UBLK_IO_OP_FLUSH		2
#define UBLK_IO_OP_DISCARD		3
#define UBLK_IO_OP_WRITE_ZEROES		5
#define UBLK_IO_OP_ZONE_OPEN		10
#define UBLK_IO_OP_ZONE_CLOSE		11
#define UBLK_IO_OP_ZONE_FINISH		12
#define UBLK_IO_OP_ZONE_APPEND		13
#define UBLK_IO_OP_ZONE_RESET_ALL	14
#define UBLK_IO_OP_ZONE_RESET		15
#define UBLK_IO_OP_REPORT_ZONES		18

/* op_flags carry these at their final bit position: test with plain & */
#define UBLK_IO_F_FUA			(1U << 13)
#define UBLK_IO_F_NOUNMAP		(1U << 15)
#define UBLK_IO_F_NEED_REG_BUF		(1U << 17)
#define UBLK_IO_F_INTEGRITY		(1U << 18)
#define UBLK_IO_F_SHMEM_ZC		(1U << 19)

/* ublksrv_io_desc.addr with that: a registered buffer, and a place in it */
#define UBLK_SHMEM_ZC_OFF_MASK		0xffffffffULL
#define UBLK_SHMEM_ZC_IDX_OFF		32

/* in ublk_shmem_buf_reg.flags */
#define UBLK_SHMEM_BUF_READ_ONLY	(1U << 0)

#define UBLK_ATTR_READ_ONLY		(1U << 0)
#define UBLK_ATTR_ROTATIONAL		(1U << 1)
#define UBLK_ATTR_VOLATILE_CACHE	(1U << 2)
#define UBLK_ATTR_FUA			(1U << 3)

#define UBLK_PARAM_TYPE_BASIC		(1U << 0)
#define UBLK_PARAM_TYPE_DISCARD		(1U << 1)
#define UBLK_PARAM_TYPE_DEVT		(1U << 2)
#define UBLK_PARAM_TYPE_ZONED		(1U << 3)
#define UBLK_PARAM_TYPE_DMA_ALIGN	(1U << 4)
#define UBLK_PARAM_TYPE_SEGMENT		(1U << 5)
#define UBLK_PARAM_TYPE_INTEGRITY	(1U << 6)

/* in ublk_param_integrity (include/uapi/linux/fs.h) */
#define LBMD_PI_CAP_INTEGRITY		(1U << 0)
#define LBMD_PI_CAP_REFTAG		(1U << 1)
#define LBMD_PI_CSUM_NONE		0
#define LBMD_PI_CSUM_IP			1
#define LBMD_PI_CSUM_CRC16_T10DIF	2
#define LBMD_PI_CSUM_CRC64_NVME		4

struct ublksrv_ctrl_cmd {
	uint32_t dev_id;
	uint16_t queue_id;	/* 0xffff: the command is about no queue */
	uint16_t len;
	uint64_t addr;
	uint64_t data[1];
	uint16_t dev_path_len;
	uint16_t pad;
	uint32_t reserved;
};

struct ublksrv_ctrl_dev_info {
	uint16_t nr_hw_queues;
	uint16_t queue_depth;
	uint16_t state;
	uint16_t io_desc_size;
	uint32_t max_io_buf_bytes;
	uint32_t dev_id;
	int32_t ublksrv_pid;
	uint32_t pad1;
	uint64_t flags;
	uint64_t ublksrv_flags;	/* opaque to the driver, kept for the server */
	uint32_t owner_uid;
	uint32_t owner_gid;
	uint64_t reserved1;
	uint64_t reserved2;
};

struct ublk_shmem_buf_reg {
	uint64_t addr;		/* both in whole pages */
	uint64_t len;
	uint32_t flags;
	uint32_t reserved;
};

struct ublksrv_io_desc {
	uint32_t op_flags;	/* op: bits 0-7, flags: bits 8-31 */
	uint32_t nr_sectors;	/* of REPORT_ZONES: nr_zones */
	uint64_t start_sector;
	uint64_t addr;
};

struct ublksrv_io_cmd {
	uint16_t q_id;
	uint16_t tag;
	int32_t result;
	uint64_t addr;		/* of a ZONE_APPEND that ends: its sector */
};

struct ublk_batch_io {
	uint16_t q_id;
	uint16_t flags;
	uint16_t nr_elem;
	uint8_t elem_bytes;
	uint8_t reserved;
	uint64_t reserved2;
};

/* struct ublk_elem_header, and the buffer behind it with HAS_BUF_ADDR */
struct ublk_elem {
	uint16_t tag;
	uint16_t buf_index;
	int32_t result;
	uint64_t buf_addr;
};

struct ublk_param_basic {
	uint32_t attrs;
	uint8_t logical_bs_shift;
	uint8_t physical_bs_shift;
	uint8_t io_opt_shift;
	uint8_t io_min_shift;
	uint32_t max_sectors;
	uint32_t chunk_sectors;
	uint64_t dev_sectors;
	uint64_t virt_boundary_mask;
};

struct ublk_param_discard {
	uint32_t discard_alignment;
	uint32_t discard_granularity;
	uint32_t max_discard_sectors;
	uint32_t max_write_zeroes_sectors;
	uint16_t max_discard_segments;
	uint16_t reserved0;
};

struct ublk_param_devt {
	uint32_t char_major;
	uint32_t char_minor;
	uint32_t disk_major;
	uint32_t disk_minor;
};

struct ublk_param_zoned {
	uint32_t max_open_zones;
	uint32_t max_active_zones;
	uint32_t max_zone_append_sectors;
	uint8_t reserved[20];
};

struct ublk_param_dma_align {
	uint32_t alignment;	/* less one */
	uint8_t pad[4];
};

struct ublk_param_segment {
	uint64_t seg_boundary_mask;
	uint32_t max_segment_size;
	uint16_t max_segments;
	uint8_t pad[2];
};

struct ublk_param_integrity {
	uint32_t flags;			/* LBMD_PI_CAP_* */
	uint16_t max_integrity_segments;
	uint8_t interval_exp;
	uint8_t metadata_size;
	uint8_t pi_offset;
	uint8_t csum_type;		/* LBMD_PI_CSUM_* */
	uint8_t tag_size;
	uint8_t pad[5];
};

/* The newest layout; older drivers take the part that they know. */
struct ublk_params {
	uint32_t len;
	uint32_t types;
	struct ublk_param_basic basic;
	struct ublk_param_discard discard;
	struct ublk_param_devt devt;
	struct ublk_param_zoned zoned;
	struct ublk_param_dma_align dma;
	uint32_t __pad;
	struct ublk_param_segment seg;
	struct ublk_param_integrity integrity;
};

_Static_assert(sizeof(struct ublksrv_ctrl_cmd) == 32, "ctrl_cmd");
_Static_assert(sizeof(struct ublksrv_ctrl_dev_info) == 64, "dev_info");
_Static_assert(sizeof(struct ublk_shmem_buf_reg) == 24, "shmem_buf_reg");
_Static_assert(sizeof(struct ublksrv_io_desc) == 24, "io_desc");
_Static_assert(sizeof(struct ublksrv_io_cmd) == 16, "io_cmd");
_Static_assert(sizeof(struct ublk_batch_io) == 16, "batch_io");
_Static_assert(sizeof(struct ublk_elem) == 16, "elem");
_Static_assert(sizeof(struct ublk_params) == 152, "params");

#endif
