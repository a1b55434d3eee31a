"""Builds ``ublkpy.uring._ffi``, the C core and its binding.

The declarations below are the whole border between Python and C: constants by
name (the compiler supplies the values), the kernel's structs that Python fills
or reads, and the functions that Python calls. Each call releases the GIL.
"""

from cffi import FFI

ENGINE = ("queue.c", "driver.c", "request.c", "place.c", "fault.c", "backing.c", "drain.c")
DATA = ("data.c", "pattern.c", "shmem.c", "integrity.c")
PYTHON = ("upcall.c", "zone.c", "file_op.c")
SOURCES = ("ring.c", *ENGINE, *DATA, *PYTHON, "map.c", "map_tree.c", "map_readers.c", "map_check.c")
HEADERS = ("io_uring.h", "ublk_cmd.h", "ring.h", "queue.h", "engine.h", "map.h", "map_private.h")

KERNEL = """
#define UBLK_U_CMD_GET_QUEUE_AFFINITY ...
#define UBLK_U_CMD_GET_DEV_INFO ...
#define UBLK_U_CMD_GET_DEV_INFO2 ...
#define UBLK_U_CMD_ADD_DEV ...
#define UBLK_U_CMD_DEL_DEV ...
#define UBLK_U_CMD_START_DEV ...
#define UBLK_U_CMD_STOP_DEV ...
#define UBLK_U_CMD_SET_PARAMS ...
#define UBLK_U_CMD_GET_PARAMS ...
#define UBLK_U_CMD_START_USER_RECOVERY ...
#define UBLK_U_CMD_END_USER_RECOVERY ...
#define UBLK_U_CMD_GET_FEATURES ...
#define UBLK_U_CMD_DEL_DEV_ASYNC ...
#define UBLK_U_CMD_UPDATE_SIZE ...
#define UBLK_U_CMD_QUIESCE_DEV ...
#define UBLK_U_CMD_TRY_STOP_DEV ...
#define UBLK_U_CMD_REG_BUF ...
#define UBLK_U_CMD_UNREG_BUF ...

#define UBLK_F_SUPPORT_ZERO_COPY ...
#define UBLK_F_URING_CMD_COMP_IN_TASK ...
#define UBLK_F_NEED_GET_DATA ...
#define UBLK_F_USER_RECOVERY ...
#define UBLK_F_USER_RECOVERY_REISSUE ...
#define UBLK_F_UNPRIVILEGED_DEV ...
#define UBLK_F_CMD_IOCTL_ENCODE ...
#define UBLK_F_USER_COPY ...
#define UBLK_F_ZONED ...
#define UBLK_F_USER_RECOVERY_FAIL_IO ...
#define UBLK_F_UPDATE_SIZE ...
#define UBLK_F_AUTO_BUF_REG ...
#define UBLK_F_QUIESCE ...
#define UBLK_F_PER_IO_DAEMON ...
#define UBLK_F_BUF_REG_OFF_DAEMON ...
#define UBLK_F_BATCH_IO ...
#define UBLK_F_INTEGRITY ...
#define UBLK_F_SAFE_STOP_DEV ...
#define UBLK_F_NO_AUTO_PART_SCAN ...
#define UBLK_F_SHMEM_ZC ...
#define UBLK_F_IO_DESC_SIZE ...

#define UBLK_S_DEV_DEAD ...
#define UBLK_S_DEV_LIVE ...
#define UBLK_S_DEV_QUIESCED ...
#define UBLK_S_DEV_FAIL_IO ...

#define UBLK_MAX_QUEUE_DEPTH ...

#define UBLK_IO_OP_READ ...
#define UBLK_IO_OP_WRITE ...
#define UBLK_IO_OP_FLUSH ...
#define UBLK_IO_OP_DISCARD ...
#define UBLK_IO_OP_WRITE_ZEROES ...
#define UBLK_IO_OP_ZONE_OPEN ...
#define UBLK_IO_OP_ZONE_CLOSE ...
#define UBLK_IO_OP_ZONE_FINISH ...
#define UBLK_IO_OP_ZONE_APPEND ...
#define UBLK_IO_OP_ZONE_RESET_ALL ...
#define UBLK_IO_OP_ZONE_RESET ...
#define UBLK_IO_OP_REPORT_ZONES ...

#define UBLK_IO_F_FUA ...
#define UBLK_IO_F_NOUNMAP ...
#define UBLK_IO_F_SHMEM_ZC ...
#define UBLK_SHMEM_BUF_READ_ONLY ...
#define UBLK_ATTR_READ_ONLY ...
#define UBLK_ATTR_ROTATIONAL ...
#define UBLK_ATTR_VOLATILE_CACHE ...
#define UBLK_ATTR_FUA ...

#define UBLK_PARAM_TYPE_BASIC ...
#define UBLK_PARAM_TYPE_DISCARD ...
#define UBLK_PARAM_TYPE_DEVT ...
#define UBLK_PARAM_TYPE_ZONED ...
#define UBLK_PARAM_TYPE_DMA_ALIGN ...
#define UBLK_PARAM_TYPE_SEGMENT ...
#define UBLK_PARAM_TYPE_INTEGRITY ...

#define LBMD_PI_CAP_INTEGRITY ...
#define LBMD_PI_CAP_REFTAG ...
#define LBMD_PI_CSUM_NONE ...
#define LBMD_PI_CSUM_IP ...
#define LBMD_PI_CSUM_CRC16_T10DIF ...
#define LBMD_PI_CSUM_CRC64_NVME ...

struct ublksrv_ctrl_cmd {
    uint32_t dev_id;
    uint16_t queue_id;
    uint16_t len;
    uint64_t addr;
    uint64_t data[1];
    uint16_t dev_path_len;
    ...;
};

struct ublksrv_ctrl_dev_info {
    uint16_t nr_hw_queues;
    uint16_t queue_depth;
    uint16_t state;
    uint16_t io_desc_size;
    uint32_t max_io_buf_bytes;
    uint32_t dev_id;
    int32_t ublksrv_pid;
    uint64_t flags;
    uint64_t ublksrv_flags;
    uint32_t owner_uid;
    uint32_t owner_gid;
    ...;
};

struct ublk_shmem_buf_reg {
    uint64_t addr;
    uint64_t len;
    uint32_t flags;
    uint32_t reserved;
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
    ...;
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
    ...;
};

struct ublk_param_dma_align { uint32_t alignment; ...; };

struct ublk_param_segment {
    uint64_t seg_boundary_mask;
    uint32_t max_segment_size;
    uint16_t max_segments;
    ...;
};

struct ublk_param_integrity {
    uint32_t flags;
    uint16_t max_integrity_segments;
    uint8_t interval_exp;
    uint8_t metadata_size;
    uint8_t pi_offset;
    uint8_t csum_type;
    uint8_t tag_size;
    ...;
};

struct ublk_params {
    uint32_t len;
    uint32_t types;
    struct ublk_param_basic basic;
    struct ublk_param_discard discard;
    struct ublk_param_devt devt;
    struct ublk_param_zoned zoned;
    struct ublk_param_dma_align dma;
    struct ublk_param_segment seg;
    struct ublk_param_integrity integrity;
    ...;
};
"""

RING = """
#define IORING_SETUP_SQE128 ...
#define IORING_OP_READ ...
#define IORING_OP_WRITE ...
#define IORING_OP_FSYNC ...
#define IORING_OP_FALLOCATE ...
#define IORING_FSYNC_DATASYNC ...

struct ur_ring { int fd; ...; };

int ur_ring_init(struct ur_ring *r, unsigned int entries,
                 unsigned int cq_entries, unsigned int flags);
void ur_ring_exit(struct ur_ring *r);
int ur_submit_cmd(struct ur_ring *r, int fd, uint32_t cmd_op, const void *cmd,
                  size_t cmd_len, uint64_t user_data);
int ur_submit_cancel(struct ur_ring *r, uint64_t victim, uint64_t user_data);
int ur_submit_async_nop(struct ur_ring *r, uint64_t user_data);
int ur_next_cqe(struct ur_ring *r, uint64_t *user_data, int32_t *res);
"""

QUEUE = """
struct ublksrv_io_desc { ...; };

enum uq_data { UQ_COPY, UQ_GET_DATA, UQ_USER_COPY, UQ_ZERO_COPY, UQ_AUTO_BUF, ... };
enum uq_event { UQ_STOPPED, UQ_IO_ERROR, UQ_UPCALLS, UQ_WOKEN, UQ_FILE_OPS, UQ_NOTHING, ... };
#define UQ_LATER ...

struct uq_metadata {
    uint8_t bytes;
    uint8_t interval_shift;
    uint8_t kind;
    uint16_t slot;
};

#define UQ_MAX_SHARED ...

struct uq_shared { ...; };

struct uq_options {
    int cdev_fd;
    uint16_t q_id;
    uint16_t depth;
    uint16_t threads;
    uint16_t thread;
    uint16_t iod_bytes;
    uint32_t buf_bytes;
    uint8_t data;
    uint8_t batch;
    uint16_t slots;
    struct uq_metadata metadata;
    const struct uq_shared *shared;
    ...;
};

struct uq_memory { unsigned char *bufs; size_t bufs_len; ...; };

struct uq_upcall {
    uint64_t pos;
    uint64_t len;
    uint64_t place;
    uint32_t what;
    uint32_t piece;
    uint32_t flags;
    uint16_t error;
    uint16_t slot;
};
#define UQ_IS_FUA ...
#define UQ_IS_EARLY ...
#define UQ_IS_ELSEWHERE ...
#define UQ_HAS_FAILED ...
#define UQ_SPACE_SHIFT ...

struct uq_ended { uint32_t id; int32_t res; };

struct uq_queue {
    uint32_t nr_pieces;
    uint32_t live;
    uint64_t errors;
    uint64_t injected;
    uint32_t error_op;
    int32_t error_res;
    uint64_t error_sector;
    struct uq_upcall *calls;
    int32_t *results;
    uint32_t nr_calls;
    uint64_t upcalls;
    struct uq_ended *ended;
    uint32_t nr_ended;
    uint32_t max_file_ops;
    ...;
};

int uq_map_memory(struct uq_memory *m, const struct uq_options *opt);
void uq_unmap_memory(struct uq_memory *m);
int uq_fetch_unserved(struct ur_ring *r, int cdev_fd, uint16_t q_id,
                      uint32_t depth, uint64_t addr);
int uq_init(struct uq_queue *q, const struct uq_options *opt,
            const struct uq_memory *memory, struct um_map *map);
int uq_run(struct uq_queue *q);
int uq_poll(struct uq_queue *q);
int uq_listen(struct uq_queue *q);
void uq_done(struct uq_queue *q);
void uq_defer(struct uq_queue *q);
void uq_exit(struct uq_queue *q);
int uq_ring_fd(const struct uq_queue *q);
bool uq_is_waiting(const struct uq_queue *q);
void uq_answer(struct uq_queue *q, uint32_t piece, int32_t res);
void uq_retry(struct uq_queue *q, uint32_t piece);
void uq_receive(struct uq_queue *q, uint32_t piece, void *buf);
int uq_file_op(struct uq_queue *q, uint32_t id, uint8_t opcode, int fd,
               uint64_t addr, uint32_t len, uint64_t off, uint32_t flags);
void uq_appended(struct uq_queue *q, uint32_t piece, uint64_t pos);
int uq_wake(struct uq_queue *q);
void uq_registering(struct uq_shared *s, int is_under_way);
int uq_share(struct uq_shared *s, uint32_t index, void *base, uint64_t len);
void uq_unshare(struct uq_shared *s, uint32_t index);
"""

MAP = """
#define UM_MAX_FILES ...
#define UM_MAX_ERRNO ...
#define UM_MAX_FAULTS ...
#define UM_FIRST_FAULT ...
#define UM_MAX_DELAY ...

enum um_op { UM_READ, UM_WRITE, UM_DISCARD, UM_WRITE_ZEROES, UM_NR_OPS, ... };
enum um_kind {
    UM_NULL, UM_ZERO, UM_ERROR, UM_UPCALL, UM_UPCALL_EARLY, UM_PATTERN, UM_MEMORY, UM_FILE, UM_STRIPE, UM_MIRROR,
    UM_SPACES, ...
};

struct um_action {
    uint8_t kind;
    uint8_t chunk_shift;
    uint16_t slot;
    uint8_t nr_legs;
    uint16_t error;
    int64_t shift;
};
struct um_routing { struct um_action actions[4]; };
struct um_extent {
    uint64_t start;
    uint64_t end;
    uint64_t offset;
    uint32_t routing;
};
struct um_file { int fd; uint8_t is_block_device; uint8_t in_memory; };
enum um_distribution { UM_CONSTANT, UM_UNIFORM, UM_EXPONENTIAL, ... };
struct um_fault {
    uint64_t delay;
    double error_rate;
    uint64_t seed;
    uint16_t error;
    uint8_t distribution;
    ...;
};
struct um_flush { uint8_t kind; uint8_t asks; uint16_t error; uint32_t nr; uint16_t slots[]; ...; };
struct um_space { struct um_flush *flush; ...; };
struct um_view {
    const struct um_file *files;
    uint32_t nr_files;
    struct um_space spaces[];
    ...;
};
struct um_map { ...; };
struct um_reader { ...; };
struct um_hit {
    uint64_t end;
    uint64_t offset;
    uint64_t at;
    uint8_t kind;
    uint8_t asks;
    uint8_t nr_legs;
    uint16_t slot;
    uint16_t space;
    int32_t error;
    ...;
};
struct um_part { uint64_t offset; uint64_t len; };
struct um_stats {
    uint64_t nr_extents;
    uint64_t nr_nodes;
    uint64_t nr_dead;
    uint32_t levels;
    uint32_t nr_routings;
    uint32_t nr_files;
    uint32_t nr_faults;
    uint32_t nr_spaces;
};

int um_init(struct um_map *map, uint64_t size);
int um_exit(struct um_map *map);
int um_add_space(struct um_map *map, uint64_t size);
int um_add_file(struct um_map *map, const struct um_file *file);
int um_add_fault(struct um_map *map, const struct um_fault *fault,
                 const char *path);
int um_add_routing(struct um_map *map, const struct um_routing *routing);
int um_replace(struct um_map *map, uint16_t space,
               const struct um_extent *pieces, uint64_t nr,
               const struct um_flush *flush);
int um_resize(struct um_map *map, uint16_t space, uint64_t size);
int um_walk(struct um_map *map, uint16_t space, uint64_t pos,
            struct um_extent *extents, uint32_t nr);
void um_get_stats(struct um_map *map, uint16_t space, struct um_stats *stats);
int um_synchronize(struct um_map *map, uint32_t timeout_ms);
int um_drain(struct um_map *map, uint64_t start, uint64_t end,
             uint32_t timeout_ms);

int um_check(struct um_map *map);
uint64_t um_probe(struct um_map *map, const uint64_t *pos, uint32_t nr,
                  uint64_t rounds);
void um_reader_add(struct um_map *map, struct um_reader *reader, int wake_fd);
void um_reader_remove(struct um_reader *reader);
void um_reader_enter(struct um_reader *r);
void um_reader_leave(struct um_reader *r);
const struct um_view *um_current(const struct um_map *map);
struct um_part um_leg(const struct um_hit *hit, uint64_t len, uint8_t leg);
void um_lookup(const struct um_view *v, uint64_t pos, enum um_op op,
               struct um_hit *hit);
"""

LIBC = """
#define AT_EMPTY_PATH ...
#define CLONE_NEWNS ...
#define FALLOC_FL_KEEP_SIZE ...
#define FALLOC_FL_PUNCH_HOLE ...
#define FALLOC_FL_ZERO_RANGE ...
#define IPC_CREAT ...
#define IPC_PRIVATE ...
#define IPC_RMID ...
#define IPC_STAT ...
#define MCL_CURRENT ...
#define MCL_FUTURE ...
#define MCL_ONFAULT ...
#define MNT_DETACH ...
#define MS_PRIVATE ...
#define MS_REC ...
#define PR_SET_IO_FLUSHER ...
#define PR_SET_PDEATHSIG ...
#define SHM_HUGETLB ...

typedef int... fs_type_t;
typedef int... off_t;
struct statfs { fs_type_t f_type; ...; };
struct statx { ...; };
int statx(int dirfd, const char *path, int flags, unsigned int mask, struct statx *buf);
int fallocate(int fd, int mode, off_t offset, off_t length);
int fstatfs(int fd, struct statfs *buf);
int unshare(int flags);
int mount(const char *source, const char *target, const char *type,
          unsigned long flags, const void *data);
int umount2(const char *target, int flags);
int mlock(const void *addr, size_t len);
int mlockall(int flags);
struct ipc_perm { unsigned int cuid; ...; };
struct shmid_ds { struct ipc_perm shm_perm; size_t shm_segsz; ...; };
int shmget(int key, size_t size, int flags);
void *shmat(int id, const void *address, int flags);
int shmdt(const void *address);
int shmctl(int id, int cmd, struct shmid_ds *buf);
int prctl(int option, unsigned long arg2, unsigned long arg3,
          unsigned long arg4, unsigned long arg5);
"""

ffibuilder = FFI()
ffibuilder.cdef(KERNEL + RING + MAP + QUEUE + LIBC)
ffibuilder.set_source(
    "ublkpy.uring._ffi",
    """
    #define _GNU_SOURCE
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <sched.h>
    #include <sys/mman.h>
    #include <sys/mount.h>
    #include <sys/prctl.h>
    #include <sys/shm.h>
    #include <sys/stat.h>
    #include <sys/vfs.h>
    #include "map.h"
    #include "queue.h"
    typedef __typeof__(((struct statfs *)0)->f_type) fs_type_t;
    """,
    sources=[f"ublkpy/uring/{name}" for name in SOURCES],
    depends=[f"ublkpy/uring/{name}" for name in HEADERS],
    include_dirs=["ublkpy/uring"],
    libraries=["m"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
