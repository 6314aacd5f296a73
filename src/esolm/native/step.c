/* A step of writing in one call: a list of operations (Op) over some rows (Pass), shared by a pool of threads.
 *
 * An operation is cut into chunks that threads take from a counter; it is done when all of its chunks are. So a thread
 * that comes late, or never, delays nobody, and one thread alone does it all.
 *
 * Sizes, alignment and lifetimes are the caller's care: native/__init__.py checks them.
 */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "draw.h"

enum { CHUNKS_A_THREAD = 16, MOST_OPS = 1024, MOST_THREADS = 64, SPINS = 2000 };

typedef struct { /* a pass at work; one of several, since a thread that sleeps in a finished one must delay nobody */
    _Atomic uint64_t state; /* number of the pass << 32 | OPEN | threads inside */
    const Op *ops;
    const Pass *passes;
    int count, threads;
    struct { _Atomic int64_t next, done; int64_t items, each, chunks, apart[3]; } part[MOST_OPS];
} Job;

static const uint64_t OPEN = 1u << 31, INSIDE = (1u << 31) - 1;
static Job jobs[8];
static _Atomic(Job *) newest;
static _Atomic int sleeping;
static int workers;
static pthread_mutex_t turn_lock = PTHREAD_MUTEX_INITIALIZER, sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t woken = PTHREAD_COND_INITIALIZER;

static void rest(int spins)
{
    if (spins > SPINS) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

static void cut(const Op *op, const Pass *pass, int threads, int64_t *items, int64_t *each)
{
    *items = op->kind == PRODUCT ? (op->outputs + PANEL - 1) / PANEL
             : op->kind == ATTEND ? pass->batch * pass->kv_heads
             : op->kind == SUM ? pass->count * blocks_of(op) : pass->count;
    *each = *items / (threads * CHUNKS_A_THREAD);
    if (*each < 1) *each = 1;
}

static void run_chunk(const Op *op, const Pass *pass, int64_t first, int64_t last, int thread)
{
    for (int64_t i = first; i < last; i++) switch (op->kind) {
        case EMBED: embed(op, pass, i); break;
        case NORM: norm(op, pass, i); break;
        case PRODUCT: product(op, pass, i); break;
        case ROTATE: turn(op, pass, i); break;
        case TAKE: take(op, pass, i); break;
        case ATTEND: attend(op, pass, i, thread); break;
        case GATE: gate(op, pass, i); break;
        case SUM: add_up(op, pass, i); break;
        default: find(op, pass, i);
    }
}

static void work(Job *job, int thread)
{
    for (int i = 0; i < job->count; i++) {
        int64_t chunks = job->part[i].chunks, each = job->part[i].each, items = job->part[i].items, mine;
        while ((mine = atomic_fetch_add(&job->part[i].next, 1)) < chunks) {
            const Op *op = job->ops + i;
            run_chunk(op, job->passes + op->pass, mine * each, (mine + 1) * each < items ? (mine + 1) * each : items, thread);
            atomic_fetch_add(&job->part[i].done, 1);
        }
        for (int spins = 0; atomic_load(&job->part[i].done) < chunks; spins++) rest(spins);
    }
}

static void *worker(void *number)
{
    int thread = (int)(intptr_t)number;
    uint64_t seen = 0, state;
    for (int spins = 0;; spins++) {
        Job *job = atomic_load(&newest);
        state = job ? atomic_load(&job->state) : 0;
        if ((state & OPEN) && state >> 32 != seen && thread < job->threads) {
            if (!atomic_compare_exchange_strong(&job->state, &state, state + 1)) continue;
            seen = state >> 32;
            work(job, thread);
            atomic_fetch_sub(&job->state, 1);
            spins = 0;
        } else if (spins < 4 * SPINS) {
            rest(0);
        } else { /* nothing to do for a while */
            pthread_mutex_lock(&sleep_lock);
            atomic_fetch_add(&sleeping, 1);
            job = atomic_load(&newest);
            if (!job || !(atomic_load(&job->state) & OPEN) || atomic_load(&job->state) >> 32 == seen)
                pthread_cond_wait(&woken, &sleep_lock);
            atomic_fetch_sub(&sleeping, 1);
            pthread_mutex_unlock(&sleep_lock);
            spins = 0;
        }
    }
    return NULL;
}

static void forget_threads(void) /* in a child of fork: they are not there */
{
    memset(jobs, 0, sizeof jobs);
    atomic_store(&newest, NULL);
    atomic_store(&sleeping, 0);
    workers = 0;
    pthread_mutex_init(&turn_lock, NULL), pthread_mutex_init(&sleep_lock, NULL), pthread_cond_init(&woken, NULL);
}

static void start_threads(int threads)
{
    static int watched;
    sigset_t all, before;
    if (!watched++) pthread_atfork(NULL, NULL, forget_threads);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the caller's */
    for (pthread_t thread; workers < threads - 1; workers++) {
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(workers + 1))) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Does a row hold an id or a position that the network does not have? It would be looked up in other memory. */
static int outside(const Op *op, const Pass *pass)
{
    const int64_t *numbers = op->kind == EMBED ? pass->tokens : op->kind == ROTATE ? pass->positions : NULL;
    for (int64_t row = 0; numbers && row < pass->count; row++)
        if (numbers[pass->at[row]] < 0 || numbers[pass->at[row]] >= op->inputs) return 1;
    return 0;
}

/* Run the operations. 0; -1 if there are too many of them; -2 for an id or a position that is not there. */
int esolm_run(const Op *ops, int count, const Pass *passes, int threads)
{
    static uint64_t number;
    if (count < 1 || count > MOST_OPS || threads < 1) return -1;
    for (int i = 0; i < count; i++)
        if (outside(ops + i, passes + ops[i].pass)) return -2;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    pthread_mutex_lock(&turn_lock); /* passes of several callers run one after the other */
    start_threads(threads);
    Job *job = jobs;
    for (int spins = 0; atomic_load(&job->state) & INSIDE; spins++) {
        job = jobs + (job - jobs + 1) % (int)(sizeof jobs / sizeof *jobs);
        rest(spins);
    }
    job->ops = ops, job->passes = passes, job->count = count, job->threads = threads;
    for (int i = 0; i < count; i++) {
        cut(ops + i, passes + ops[i].pass, threads, &job->part[i].items, &job->part[i].each);
        job->part[i].chunks = (job->part[i].items + job->part[i].each - 1) / job->part[i].each;
        atomic_store(&job->part[i].next, 0), atomic_store(&job->part[i].done, 0);
    }
    atomic_store(&job->state, ++number << 32 | OPEN);
    atomic_store(&newest, job);
    if (atomic_load(&sleeping)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&woken);
        pthread_mutex_unlock(&sleep_lock);
    }
    work(job, 0);
    atomic_fetch_and(&job->state, ~OPEN);
    pthread_mutex_unlock(&turn_lock);
    return 0;
}

/* Ask for large pages under memory that is read from front to back. */
void esolm_advise(void *at, size_t size)
{
#if defined(MADV_HUGEPAGE)
    uintptr_t page = 1 << 21, first = ((uintptr_t)at + page - 1) / page * page, last = ((uintptr_t)at + size) / page * page;
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
}

/* What the caller's picture of these must match: bytes of Op and of Pass, outputs of a panel, lanes, queries together,
 * ids of a block; and whether PAIRS are multiplied here. */
void esolm_sizes(int64_t *to)
{
    to[0] = sizeof(Op), to[1] = sizeof(Pass), to[2] = PANEL, to[3] = LANES, to[4] = QUERIES, to[5] = BLOCK, to[6] = HAS_PAIRS;
}
