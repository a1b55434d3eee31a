// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "map_private.h"

/* The epoch since which each reader has been outside or has entered. */
static uint64_t oldest_seen(const struct um_map *map)
{
	uint64_t oldest = UINT64_MAX;

	for (struct um_reader *r = map->readers; r; r = r->next) {
		/*
		 * Sequentially consistent: see um_reader_enter(). Also an
		 * acquire: what the reader read before has been read.
		 */
		uint64_t seen = __atomic_load_n(&r->seen, __ATOMIC_SEQ_CST);

		if (seen && seen < oldest)
			oldest = seen;
	}
	return oldest;
}

void um_reclaim(struct um_map *map)
{
	struct um_dead **link = &map->dead, *dead;
	uint64_t oldest;

	if (!*link)
		return;
	oldest = oldest_seen(map);
	/* Latest first: from here on, all are old enough. */
	while (*link && (*link)->epoch > oldest)
		link = &(*link)->next;
	dead = *link;
	*link = NULL;
	while (dead) {
		struct um_dead *next = dead->next;

		if (dead->mem)
			free(dead->mem);
		else
			mt_recycle(map, dead);
		map->nr_dead--;
		dead = next;
	}
}

void um_bury(struct um_map *map, struct um_dead *dead)
{
	dead->epoch = map->epoch;
	dead->next = map->dead;
	map->dead = dead;
	map->nr_dead++;
}

void um_reader_add(struct um_map *map, struct um_reader *reader, int wake_fd)
{
	pthread_mutex_lock(&map->lock);
	*reader = (struct um_reader){
		.map = map,
		.next = map->readers,
		.drained = map->drain.nr,
		.thread = pthread_self(),
		.wake_fd = wake_fd,
	};
	map->readers = reader;
	pthread_mutex_unlock(&map->lock);
}

void um_reader_remove(struct um_reader *reader)
{
	struct um_map *map = reader->map;
	struct um_reader **link = &map->readers;

	pthread_mutex_lock(&map->lock);
	while (*link != reader)
		link = &(*link)->next;
	*link = reader->next;
	um_reclaim(map);
	pthread_mutex_unlock(&map->lock);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* A while without the lock, longer each time; false when the time is up. */
static bool pause_unlocked(struct um_map *map, struct timespec *pause,
			   uint64_t deadline)
{
	pthread_mutex_unlock(&map->lock);
	nanosleep(pause, NULL);
	if (pause->tv_nsec < 1000000)
		pause->tv_nsec *= 2;
	pthread_mutex_lock(&map->lock);
	return now_ns() < deadline;
}

int um_synchronize(struct um_map *map, uint32_t timeout_ms)
{
	uint64_t deadline = now_ns() + timeout_ms * 1000000ULL, epoch;
	struct timespec pause = { .tv_nsec = 20000 };
	int ret = 0;

	pthread_mutex_lock(&map->lock);
	epoch = map->epoch + 1;
	/* Release: whoever enters with this epoch sees the current view. */
	__atomic_store_n(&map->epoch, epoch, __ATOMIC_RELEASE);
	while (!ret && oldest_seen(map) < epoch)
		if (!pause_unlocked(map, &pause, deadline))
			ret = -ETIMEDOUT;
	um_reclaim(map);
	pthread_mutex_unlock(&map->lock);
	return ret;
}

static bool is_drained(const struct um_map *map)
{
	for (const struct um_reader *r = map->readers; r; r = r->next)
		if (r->wake_fd >= 0 && r->drained < map->drain.nr)
			return false;
	return true;
}

static bool is_reader(const struct um_map *map, pthread_t thread)
{
	for (const struct um_reader *r = map->readers; r; r = r->next)
		if (r->wake_fd >= 0 && pthread_equal(r->thread, thread))
			return true;
	return false;
}

/* Puts the question to all readers. */
static int ask_to_drain(struct um_map *map, uint64_t start, uint64_t end)
{
	const uint64_t one = 1;

	map->drain = (struct um_drain){ map->drain.nr + 1, start, end };
	for (struct um_reader *r = map->readers; r; r = r->next)
		if (r->wake_fd >= 0 &&
		    write(r->wake_fd, &one, sizeof(one)) < 0 && errno != EAGAIN)
			return -errno;
	return 0;
}

int um_drain(struct um_map *map, uint64_t start, uint64_t end,
	     uint32_t timeout_ms)
{
	uint64_t deadline = now_ns() + timeout_ms * 1000000ULL;
	struct timespec pause = { .tv_nsec = 20000 };
	int ret = 0;

	pthread_mutex_lock(&map->lock);
	if (is_reader(map, pthread_self()))
		ret = -EDEADLK;
	while (!ret && map->draining)
		if (!pause_unlocked(map, &pause, deadline))
			ret = -ETIMEDOUT;
	if (!ret) {
		map->draining = true;
		ret = ask_to_drain(map, start, end);
		while (!ret && !is_drained(map))
			if (!pause_unlocked(map, &pause, deadline))
				ret = -ETIMEDOUT;
		map->draining = false;
	}
	pthread_mutex_unlock(&map->lock);
	return ret;
}

struct um_drain um_last_drain(const struct um_reader *reader)
{
	struct um_drain drain;

	pthread_mutex_lock(&reader->map->lock);
	drain = reader->map->drain;
	pthread_mutex_unlock(&reader->map->lock);
	return drain;
}

void um_drained(struct um_reader *reader, uint64_t nr)
{
	pthread_mutex_lock(&reader->map->lock);
	reader->drained = nr;
	pthread_mutex_unlock(&reader->map->lock);
}

void um_lookup_tree(const struct um_view *v, uint16_t space, uint64_t pos,
		    enum um_op op, struct um_hit *hit)
{
	const struct um_node *n = v->spaces[space].root;
	uint64_t end = v->spaces[space].size;
	unsigned int i;

	if (pos >= end) {
		*hit = (struct um_hit){ .end = UINT64_MAX, .kind = UM_ERROR,
					.error = -EIO, .at = pos,
					.space = space };
		return;
	}
	for (unsigned int level = v->spaces[space].level;; level--) {
		i = um_find(n, pos);
		if (n->keys[i + 1] < end)
			end = n->keys[i + 1];
		if (!level)
			break;
		n = n->child[i];
		if (level == 1)
			um_prefetch(n);
	}
	hit->end = end;
	um_resolve(v, space, &v->routings[n->routing[i]].actions[op], pos,
		   n->offset[i] + (pos - n->keys[i]), op, hit);
}

/* As deep as spaces go on in others, whose numbers are higher each time. */
void um_resolve_space(const struct um_view *v, const struct um_action *action,
		      uint64_t pos, uint64_t p, enum um_op op,
		      struct um_hit *hit)
{
	uint64_t chunk = p >> action->chunk_shift;
	uint64_t within = p & ((1ULL << action->chunk_shift) - 1);
	uint64_t left = (1ULL << action->chunk_shift) - within;
	uint64_t there = (chunk / action->nr_legs << action->chunk_shift) +
			 within + (uint64_t)action->shift;

	if (hit->end - pos < left)
		left = hit->end - pos;
	um_lookup_tree(v, (uint16_t)(action->slot + chunk % action->nr_legs),
		       there, op, hit);
	if (hit->end - there < left)
		left = hit->end - there;
	hit->end = pos + left;
}

/* How much of the first p bytes of a stripe is in one leg. */
static uint64_t in_leg(const struct um_action *action, uint64_t p, uint8_t leg)
{
	uint64_t chunk = 1ULL << action->chunk_shift;
	uint64_t width = chunk * action->nr_legs;
	uint64_t rest = p % width, before = leg * chunk;

	if (rest <= before)
		rest = 0;
	else
		rest = rest - before < chunk ? rest - before : chunk;
	return p / width * chunk + rest;
}

struct um_part um_leg(const struct um_hit *hit, uint64_t len, uint8_t leg)
{
	const struct um_action *action = hit->action;
	uint64_t p = hit->offset - (uint64_t)action->shift;
	struct um_part part = { hit->offset, len };

	if (action->kind == UM_STRIPE) {
		part.offset = in_leg(action, p, leg);
		part.len = in_leg(action, p + len, leg) - part.offset;
		part.offset += (uint64_t)action->shift;
	}
	return part;
}
