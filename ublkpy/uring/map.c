// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "map.h"

#include <stdlib.h>
#include <string.h>

#include "map_private.h"

#define SECTOR		512
#define MIN_CHUNK_SHIFT	9
#define MAX_CHUNK_SHIFT	40
#define MAX_ROUTINGS	(1U << 24)

struct um_table {
	struct um_dead dead;
	uint32_t nr;
	uint32_t room;
	unsigned char items[] __attribute__((aligned(64)));
};

static const struct um_routing *routings(const struct um_map *map)
{
	return (const void *)map->routings->items;
}

static struct um_table *new_table(uint32_t room, size_t item)
{
	struct um_table *table = um_alloc(sizeof(*table) + room * item);

	if (!table)
		return NULL;
	table->dead.mem = table;
	table->nr = 0;
	table->room = room;
	return table;
}

static struct um_flush *new_flush(uint8_t kind, uint16_t error,
				  const uint16_t *slots, uint32_t nr)
{
	struct um_flush *flush = um_alloc(sizeof(*flush) + nr * sizeof(*slots));

	if (!flush)
		return NULL;
	flush->dead.mem = flush;
	flush->kind = kind;
	flush->error = error;
	flush->nr = nr;
	if (nr)
		memcpy(flush->slots, slots, nr * sizeof(*slots));
	return flush;
}

static struct um_view *new_view(void)
{
	struct um_view *view = um_alloc(sizeof(*view));

	if (view)
		*view = (struct um_view){ .dead.mem = view };
	return view;
}

/*
 * Makes view the current one. It takes the map's tables and flush as they are,
 * and the caller buries what of the old ones it replaced.
 */
static void publish(struct um_map *map, struct um_view *view,
		    const struct mt_change *t)
{
	struct um_view *old = map->view;
	const struct um_node *root = t->root;

	view->size = t->size;
	view->root = t->root;
	view->level = t->root->level;
	view->nr_extents = t->nr_extents;
	view->routings = routings(map);
	view->files = (const void *)map->files->items;
	view->nr_files = map->files->nr;
	view->faults = (const void *)map->faults->items;
	view->flush = map->flush;
	if (t->nr_extents == 1) {
		view->only = &view->routings[root->routing[0]];
		view->only_offset = root->offset[0];
	}
	map->nr_nodes = t->nr_nodes;
	/* See um_reader_enter(); a release of what the view points to, too. */
	__atomic_store_n(&map->view, view, __ATOMIC_SEQ_CST);
	/* Release: whoever reads this epoch sees the view. */
	__atomic_store_n(&map->epoch, t->epoch, __ATOMIC_RELEASE);
	if (old)
		um_bury(map, &old->dead);
	for (struct um_dead *dead = t->dead, *next; dead; dead = next) {
		next = dead->next;
		um_bury(map, dead);
	}
}

/* Makes room in a table for one more. */
static int grow(struct um_map *map, struct um_table **table, size_t item)
{
	struct um_table *old = *table, *bigger;
	struct um_view *view;
	struct mt_change t;

	if (old->nr < old->room)
		return 0;
	bigger = new_table(2 * old->room, item);
	view = new_view();
	if (!bigger || !view) {
		free(bigger);
		free(view);
		return -ENOMEM;
	}
	memcpy(bigger->items, old->items, old->nr * item);
	bigger->nr = old->nr;
	*table = bigger;
	mt_begin(&t, map);
	publish(map, view, &t);
	mt_commit(&t);
	um_bury(map, &old->dead);
	um_reclaim(map);
	return 0;
}

/* Readers do not look behind what the current view knows of: no ordering. */
static int append(struct um_map *map, struct um_table **table, const void *what,
		  size_t item, uint32_t max)
{
	int ret;

	if ((*table)->nr == max)
		return -ENOSPC;
	ret = grow(map, table, item);
	if (ret)
		return ret;
	memcpy((*table)->items + (*table)->nr * item, what, item);
	return (int)(*table)->nr++;
}

static bool is_size(uint64_t size)
{
	return size && size % SECTOR == 0 && size <= INT64_MAX;
}

int um_init(struct um_map *map, uint64_t size)
{
	static const struct um_routing null;
	struct um_view *view = new_view();
	struct mt_change t;
	int ret;

	memset(map, 0, sizeof(*map));
	map->routings = new_table(4, sizeof(struct um_routing));
	map->files = new_table(8, sizeof(struct um_file));
	map->faults = new_table(4, sizeof(struct um_fault));
	map->flush = new_flush(UM_NULL, 0, NULL, 0);
	mt_begin(&t, map);
	ret = mt_plant(&t, size);
	if (!is_size(size))
		ret = -EINVAL;
	else if (!view || !map->routings || !map->files || !map->faults ||
		 !map->flush)
		ret = -ENOMEM;
	if (!ret)
		ret = -pthread_mutex_init(&map->lock, NULL);
	if (ret) {
		mt_abort(&t);
		mt_trim(map, 0);
		free(view);
		free(map->routings);
		free(map->files);
		free(map->faults);
		free(map->flush);
		return ret;
	}
	append(map, &map->routings, &null, sizeof(null), 1);
	publish(map, view, &t);
	mt_commit(&t);
	return 0;
}

static void free_faults(struct um_table *faults)
{
	struct um_fault *fault = (void *)faults->items;

	for (uint32_t i = 0; i < faults->nr; i++)
		free(fault[i].path);
	free(faults);
}

int um_exit(struct um_map *map)
{
	if (map->readers)
		return -EBUSY;
	um_reclaim(map);
	mt_free(map->view->root);
	mt_trim(map, 0);
	free(map->view);
	free(map->routings);
	free(map->files);
	free_faults(map->faults);
	free(map->flush);
	return -pthread_mutex_destroy(&map->lock);
}

int um_add_file(struct um_map *map, const struct um_file *file)
{
	int ret;

	pthread_mutex_lock(&map->lock);
	ret = append(map, &map->files, file, sizeof(*file), UM_MAX_FILES);
	pthread_mutex_unlock(&map->lock);
	return ret;
}

static bool fault_is_valid(const struct um_fault *f)
{
	return f->delay <= UM_MAX_DELAY && f->error_rate >= 0 &&
	       f->error_rate <= 1 && f->error && f->error <= UM_MAX_ERRNO &&
	       f->distribution <= UM_EXPONENTIAL;
}

int um_add_fault(struct um_map *map, const struct um_fault *fault,
		 const char *path)
{
	struct um_fault copy = *fault;
	int ret;

	if (!fault_is_valid(fault))
		return -EINVAL;
	copy.path = path ? strdup(path) : NULL;
	if (path && !copy.path)
		return -ENOMEM;
	pthread_mutex_lock(&map->lock);
	ret = append(map, &map->faults, &copy, sizeof(copy), UM_MAX_FAULTS);
	pthread_mutex_unlock(&map->lock);
	if (ret < 0)
		free(copy.path);
	return ret;
}

/* No error, or a fault that was added. */
static bool may_go_on(const struct um_map *map, uint16_t error)
{
	return !error || (error >= UM_FIRST_FAULT &&
			  error - UM_FIRST_FAULT < (int)map->faults->nr);
}

static bool action_is_valid(const struct um_map *map, const struct um_action *a)
{
	switch (a->kind) {
	case UM_NULL:
	case UM_ZERO:
	case UM_UPCALL:
	case UM_UPCALL_EARLY:
	case UM_PATTERN:
	case UM_MEMORY:
		return may_go_on(map, a->error);
	case UM_ERROR:
		return a->error && a->error <= UM_MAX_ERRNO;
	case UM_FILE:
		return may_go_on(map, a->error) && a->slot < map->files->nr;
	case UM_STRIPE:
	case UM_MIRROR:
		return may_go_on(map, a->error) && a->nr_legs &&
		       (uint32_t)a->slot + a->nr_legs <= map->files->nr &&
		       a->chunk_shift >= MIN_CHUNK_SHIFT &&
		       a->chunk_shift <= MAX_CHUNK_SHIFT;
	default:
		return false;
	}
}

int um_add_routing(struct um_map *map, const struct um_routing *routing)
{
	int ret = 0;

	pthread_mutex_lock(&map->lock);
	for (unsigned int op = 0; op < UM_NR_OPS; op++)
		if (!action_is_valid(map, &routing->actions[op]))
			ret = -EINVAL;
	if (!ret)
		ret = append(map, &map->routings, routing, sizeof(*routing),
			     MAX_ROUTINGS);
	pthread_mutex_unlock(&map->lock);
	return ret;
}

/* Whether the places of all bytes are some that a file or memory can have. */
static bool fits_place(const struct um_extent *e, const struct um_action *a)
{
	uint64_t len = e->end - e->start, lowest = e->offset;

	if (a->kind < UM_PATTERN)
		return true;
	if (e->offset > INT64_MAX || len > INT64_MAX - e->offset)
		return false;
	if (a->kind == UM_STRIPE)
		lowest = (lowest >> a->chunk_shift) / a->nr_legs
			 << a->chunk_shift;
	if (a->shift < 0)
		return lowest >= 0 - (uint64_t)a->shift;
	return e->offset + len <= INT64_MAX - (uint64_t)a->shift;
}

static int check_place(const struct um_map *map, const struct um_extent *e)
{
	const struct um_routing *routing = &routings(map)[e->routing];

	for (unsigned int op = 0; op < UM_NR_OPS; op++)
		if (!fits_place(e, &routing->actions[op]))
			return -EINVAL;
	return 0;
}

static int check_piece(const struct um_map *map, const struct um_extent *e)
{
	if (e->start % SECTOR || e->end % SECTOR || e->start >= e->end ||
	    e->end > map->view->size || e->routing >= map->routings->nr)
		return -EINVAL;
	return check_place(map, e);
}

static int check_flush(const struct um_map *map, const struct um_flush *flush)
{
	if (flush->kind != UM_NULL && flush->kind != UM_UPCALL &&
	    flush->kind != UM_FILE)
		return -EINVAL;
	if ((flush->nr || flush->asks) && flush->kind != UM_FILE)
		return -EINVAL;
	if (!may_go_on(map, flush->error))
		return -EINVAL;
	for (uint32_t i = 0; i < flush->nr; i++)
		if (flush->slots[i] >= map->files->nr ||
		    (i && flush->slots[i] <= flush->slots[i - 1]))
			return -EINVAL;
	return 0;
}

static int by_start(const void *a, const void *b)
{
	const struct um_extent *x = a, *y = b;

	return (x->start > y->start) - (x->start < y->start);
}

/* The valid pieces in order, without offsets that nobody uses, or -errno. */
static int sort_pieces(const struct um_map *map, const struct um_extent *pieces,
		       uint64_t nr, struct um_extent *sorted)
{
	bool in_order = true;
	int ret;

	for (uint64_t i = 0; i < nr; i++) {
		ret = check_piece(map, &pieces[i]);
		if (ret)
			return ret;
		sorted[i] = pieces[i];
		if (!mt_is_placed(&routings(map)[pieces[i].routing]))
			sorted[i].offset = 0;
		if (i && pieces[i].start < pieces[i - 1].start)
			in_order = false;
	}
	if (!in_order)
		qsort(sorted, nr, sizeof(*sorted), by_start);
	for (uint64_t i = 1; i < nr; i++)
		if (sorted[i].start < sorted[i - 1].end)
			return -EINVAL;
	return 0;
}

static int replace(struct um_map *map, const struct um_extent *pieces,
		   uint64_t nr, struct um_flush *flush)
{
	struct um_view *view = new_view();
	struct mt_change t;
	int ret = 0;

	if (!view)
		return -ENOMEM;
	mt_begin(&t, map);
	/* Those of the view may have been outgrown by one of these pieces. */
	t.routings = routings(map);
	for (uint64_t i = 0; !ret && i < nr; i++)
		ret = mt_put(&t, &pieces[i]);
	if (ret) {
		mt_abort(&t);
		free(view);
		return ret;
	}
	if (flush) {
		struct um_flush *old = map->flush;

		map->flush = flush;
		publish(map, view, &t);
		um_bury(map, &old->dead);
	} else {
		publish(map, view, &t);
	}
	mt_commit(&t);
	um_reclaim(map);
	return 0;
}

int um_replace(struct um_map *map, const struct um_extent *pieces, uint64_t nr,
	       const struct um_flush *flush)
{
	struct um_extent *sorted = NULL;
	struct um_flush *copy = NULL;
	int ret = 0;

	if (nr > SIZE_MAX / sizeof(*sorted) ||
	    (flush && flush->nr > UM_MAX_FILES))
		return -EINVAL;
	if (nr)
		sorted = malloc(nr * sizeof(*sorted));
	if (flush)
		copy = new_flush(flush->kind, flush->error, flush->slots,
				 flush->nr);
	if ((nr && !sorted) || (flush && !copy))
		ret = -ENOMEM;
	pthread_mutex_lock(&map->lock);
	if (!ret && flush)
		ret = check_flush(map, flush);
	if (!ret)
		ret = sort_pieces(map, pieces, nr, sorted);
	if (!ret)
		ret = replace(map, sorted, nr, copy);
	pthread_mutex_unlock(&map->lock);
	free(sorted);
	if (ret)
		free(copy);
	return ret;
}

/* What is behind size is made to continue what is before it, and left out. */
static int cut(struct mt_change *t, uint64_t size)
{
	struct um_extent e;

	if (size >= t->size)
		return 0;
	mt_get(t->root, t->size, size - 1, &e);
	if (mt_is_placed(&t->routings[e.routing]))
		e.offset += size - e.start;
	e.start = size;
	e.end = t->size;
	return mt_put(t, &e);
}

static int resize(struct um_map *map, uint64_t size)
{
	struct um_view *view;
	struct um_extent last;
	struct mt_change t;
	int ret;

	mt_get(map->view->root, map->view->size, map->view->size - 1, &last);
	last.end = size;
	if (size > map->view->size && check_place(map, &last))
		return -EINVAL;
	view = new_view();
	if (!view)
		return -ENOMEM;
	mt_begin(&t, map);
	ret = cut(&t, size);
	if (ret) {
		mt_abort(&t);
		free(view);
		return ret;
	}
	t.size = size;
	publish(map, view, &t);
	mt_commit(&t);
	um_reclaim(map);
	return 0;
}

int um_resize(struct um_map *map, uint64_t size)
{
	int ret;

	if (!is_size(size))
		return -EINVAL;
	pthread_mutex_lock(&map->lock);
	ret = resize(map, size);
	pthread_mutex_unlock(&map->lock);
	return ret;
}

int um_walk(struct um_map *map, uint64_t pos, struct um_extent *extents,
	    uint32_t nr)
{
	uint32_t i;

	pthread_mutex_lock(&map->lock);
	for (i = 0; i < nr && pos < map->view->size; i++) {
		mt_get(map->view->root, map->view->size, pos, &extents[i]);
		pos = extents[i].end;
	}
	pthread_mutex_unlock(&map->lock);
	return (int)i;
}

void um_get_stats(struct um_map *map, struct um_stats *stats)
{
	pthread_mutex_lock(&map->lock);
	um_reclaim(map);
	*stats = (struct um_stats){
		.nr_extents = map->view->nr_extents,
		.nr_nodes = map->nr_nodes,
		.nr_dead = map->nr_dead,
		.levels = map->view->root->level + 1U,
		.nr_routings = map->routings->nr,
		.nr_files = map->files->nr,
		.nr_faults = map->faults->nr,
	};
	pthread_mutex_unlock(&map->lock);
}
