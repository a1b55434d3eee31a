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

static struct um_flush *copy_flush(const struct um_flush *of)
{
	size_t bytes = sizeof(*of) + of->nr * sizeof(of->slots[0]);
	struct um_flush *flush = um_alloc(bytes);

	if (!flush)
		return NULL;
	memcpy(flush, of, bytes);
	flush->dead.mem = flush;
	return flush;
}

static struct um_view *new_view(uint32_t nr_spaces)
{
	size_t spaces = nr_spaces * sizeof(struct um_space);
	struct um_view *view = um_alloc(sizeof(*view) + spaces);

	if (!view)
		return NULL;
	*view = (struct um_view){ .dead.mem = view,
				  .nr_spaces = (uint16_t)nr_spaces };
	memset(view->spaces, 0, spaces);
	return view;
}

/* Its tables are the map's, which may have grown. */
static void fill_space(const struct um_view *view, struct um_space *space)
{
	const struct um_node *root = space->root;

	space->level = root->level;
	space->only = NULL;
	if (space->nr_extents == 1) {
		space->only = &view->routings[root->routing[0]];
		space->only_offset = root->offset[0];
	}
}

/*
 * Makes view the current one. It takes the map's tables as they are, and the
 * caller buries what of the old ones it replaced.
 */
static void publish(struct um_map *map, struct um_view *view,
		    const struct mt_change *t)
{
	struct um_view *old = map->view;

	view->routings = routings(map);
	view->files = (const void *)map->files->items;
	view->nr_files = map->files->nr;
	view->faults = (const void *)map->faults->items;
	if (old)
		memcpy(view->spaces, old->spaces,
		       old->nr_spaces * sizeof(old->spaces[0]));
	view->spaces[t->space] = (struct um_space){
		.size = t->size,
		.root = t->root,
		.flush = t->flush,
		.nr_extents = t->nr_extents,
	};
	for (unsigned int i = 0; i < view->nr_spaces; i++)
		fill_space(view, &view->spaces[i]);
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
	view = new_view(map->view->nr_spaces);
	if (!bigger || !view) {
		free(bigger);
		free(view);
		return -ENOMEM;
	}
	memcpy(bigger->items, old->items, old->nr * item);
	bigger->nr = old->nr;
	*table = bigger;
	mt_begin(&t, map, 0);
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

static void free_view(struct um_view *view)
{
	for (unsigned int i = 0; i < view->nr_spaces; i++) {
		mt_free(view->spaces[i].root);
		free(view->spaces[i].flush);
	}
	free(view);
}

/* One extent of routing 0, as the space that comes next. */
static int add_space(struct um_map *map, uint32_t nr, uint64_t size)
{
	static const struct um_flush null = { .kind = UM_NULL };
	struct um_view *view = new_view(nr + 1);
	struct um_flush *flush = copy_flush(&null);
	struct mt_change t;
	int ret;

	mt_begin(&t, map, (uint16_t)nr);
	ret = mt_plant(&t, size);
	if (!is_size(size))
		ret = -EINVAL;
	else if (!view || !flush)
		ret = -ENOMEM;
	if (ret) {
		mt_abort(&t);
		free(view);
		free(flush);
		return ret;
	}
	t.flush = flush;
	publish(map, view, &t);
	mt_commit(&t);
	um_reclaim(map);
	return (int)nr;
}

int um_add_space(struct um_map *map, uint64_t size)
{
	uint32_t nr;
	int ret = -ENOSPC;

	pthread_mutex_lock(&map->lock);
	nr = map->view->nr_spaces;
	if (nr < UM_MAX_SPACES)
		ret = add_space(map, nr, size);
	pthread_mutex_unlock(&map->lock);
	return ret;
}

int um_init(struct um_map *map, uint64_t size)
{
	static const struct um_routing null;
	int ret = -ENOMEM;

	memset(map, 0, sizeof(*map));
	map->routings = new_table(4, sizeof(struct um_routing));
	map->files = new_table(8, sizeof(struct um_file));
	map->faults = new_table(4, sizeof(struct um_fault));
	if (map->routings && map->files && map->faults) {
		append(map, &map->routings, &null, sizeof(null), 1);
		ret = add_space(map, 0, size);
	}
	if (ret >= 0)
		ret = -pthread_mutex_init(&map->lock, NULL);
	if (ret) {
		if (map->view)
			free_view(map->view);
		mt_trim(map, 0);
		free(map->routings);
		free(map->files);
		free(map->faults);
	}
	return ret;
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
	free_view(map->view);
	mt_trim(map, 0);
	free(map->routings);
	free(map->files);
	free_faults(map->faults);
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

static bool has_legs(const struct um_action *a, uint32_t of)
{
	return a->nr_legs && (uint32_t)a->slot + a->nr_legs <= of &&
	       a->chunk_shift >= MIN_CHUNK_SHIFT &&
	       a->chunk_shift <= MAX_CHUNK_SHIFT;
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
		return may_go_on(map, a->error) && has_legs(a, map->files->nr);
	case UM_SPACES: /* what befalls a request there is theirs to say */
		return !a->error && has_legs(a, map->view->nr_spaces);
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
	if (a->kind == UM_STRIPE || a->kind == UM_SPACES)
		lowest = (lowest >> a->chunk_shift) / a->nr_legs
			 << a->chunk_shift;
	if (a->shift < 0)
		return lowest >= 0 - (uint64_t)a->shift;
	return e->offset + len <= INT64_MAX - (uint64_t)a->shift;
}

/* Also that no space goes on in itself, through whatever others. */
static int check_place(const struct um_map *map, uint16_t space,
		       const struct um_extent *e)
{
	const struct um_action *a = routings(map)[e->routing].actions;

	for (unsigned int op = 0; op < UM_NR_OPS; op++, a++)
		if (!fits_place(e, a) ||
		    (a->kind == UM_SPACES && a->slot <= space))
			return -EINVAL;
	return 0;
}

static int check_piece(const struct um_map *map, uint16_t space,
		       const struct um_extent *e)
{
	if (e->start % SECTOR || e->end % SECTOR || e->start >= e->end ||
	    e->end > map->view->spaces[space].size ||
	    e->routing >= map->routings->nr)
		return -EINVAL;
	return check_place(map, space, e);
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
static int sort_pieces(const struct um_map *map, uint16_t space,
		       const struct um_extent *pieces, uint64_t nr,
		       struct um_extent *sorted)
{
	bool in_order = true;
	int ret;

	for (uint64_t i = 0; i < nr; i++) {
		ret = check_piece(map, space, &pieces[i]);
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

static int replace(struct um_map *map, uint16_t space,
		   const struct um_extent *pieces, uint64_t nr,
		   struct um_flush *flush)
{
	struct um_view *view = new_view(map->view->nr_spaces);
	struct um_flush *old;
	struct mt_change t;
	int ret = 0;

	if (!view)
		return -ENOMEM;
	mt_begin(&t, map, space);
	/* Those of the view may have been outgrown by one of these pieces. */
	t.routings = routings(map);
	for (uint64_t i = 0; !ret && i < nr; i++)
		ret = mt_put(&t, &pieces[i]);
	if (ret) {
		mt_abort(&t);
		free(view);
		return ret;
	}
	old = t.flush;
	if (flush)
		t.flush = flush;
	publish(map, view, &t);
	if (flush)
		um_bury(map, &old->dead);
	mt_commit(&t);
	um_reclaim(map);
	return 0;
}

int um_replace(struct um_map *map, uint16_t space,
	       const struct um_extent *pieces, uint64_t nr,
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
		copy = copy_flush(flush);
	if ((nr && !sorted) || (flush && !copy))
		ret = -ENOMEM;
	pthread_mutex_lock(&map->lock);
	if (!ret && flush)
		ret = check_flush(map, flush);
	if (!ret)
		ret = sort_pieces(map, space, pieces, nr, sorted);
	if (!ret)
		ret = replace(map, space, sorted, nr, copy);
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

static int resize(struct um_map *map, uint16_t space, uint64_t size)
{
	const struct um_space *old = &map->view->spaces[space];
	struct um_view *view;
	struct um_extent last;
	struct mt_change t;
	int ret;

	mt_get(old->root, old->size, old->size - 1, &last);
	last.end = size;
	if (size > old->size && check_place(map, space, &last))
		return -EINVAL;
	view = new_view(map->view->nr_spaces);
	if (!view)
		return -ENOMEM;
	mt_begin(&t, map, space);
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

int um_resize(struct um_map *map, uint16_t space, uint64_t size)
{
	int ret;

	if (!is_size(size))
		return -EINVAL;
	pthread_mutex_lock(&map->lock);
	ret = resize(map, space, size);
	pthread_mutex_unlock(&map->lock);
	return ret;
}

int um_walk(struct um_map *map, uint16_t space, uint64_t pos,
	    struct um_extent *extents, uint32_t nr)
{
	const struct um_space *s;
	uint32_t i;

	pthread_mutex_lock(&map->lock);
	s = &map->view->spaces[space];
	for (i = 0; i < nr && pos < s->size; i++) {
		mt_get(s->root, s->size, pos, &extents[i]);
		pos = extents[i].end;
	}
	pthread_mutex_unlock(&map->lock);
	return (int)i;
}

void um_get_stats(struct um_map *map, uint16_t space, struct um_stats *stats)
{
	const struct um_space *s;

	pthread_mutex_lock(&map->lock);
	um_reclaim(map);
	s = &map->view->spaces[space];
	*stats = (struct um_stats){
		.nr_extents = s->nr_extents,
		.nr_nodes = map->nr_nodes,
		.nr_dead = map->nr_dead,
		.levels = s->level + 1U,
		.nr_routings = map->routings->nr,
		.nr_files = map->files->nr,
		.nr_faults = map->faults->nr,
		.nr_spaces = map->view->nr_spaces,
	};
	pthread_mutex_unlock(&map->lock);
}
