// Runs one Metal grid on the CPU, the way a GPU may: one fiber per thread, simdgroups of 32, one threadgroup at a time.
//
// A lane runs until it meets a collective, a barrier or its end. When all lanes of its simdgroup (for a threadgroup
// barrier: of its threadgroup) stand at the same place in the text, they go on; any other standstill is an error, never
// a hang. In a build with checks, clang calls us before every load and store (-fsanitize-coverage), and a shadow of
// every byte of the outputs, of inputs that are written and of threadgroup memory knows who touched it last and before
// which barrier.
// The first error ends the run. One OS thread; x86-64 and arm64 (the latter compiles, and has not been run).
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// ---- what Python passes (executor.py has the same structures) --------------------------------------------------------
enum BufferKind : int32_t { INPUT, OUTPUT, SHARED, WRITTEN };  // WRITTEN: an input that the kernel may write
struct Buffer {
  void* data;
  uint64_t size;       // bytes
  int32_t kind, filled;  // filled: an output that starts with init_value
  const char* name;
};
struct Traffic {  // of one buffer over the whole grid
  uint64_t read, written;                // bytes, every access counted
  uint64_t unique_read, unique_written;  // bytes, each counted once
  uint64_t accesses, lines, least_lines;  // by simdgroups: 128-byte lines touched, and the fewest that could hold the bytes
  uint64_t touched_lines, fetched_lines;  // lines: each once in the grid, and each once in a threadgroup
};
struct Counts {
  uint64_t threadgroup_barriers, simdgroup_barriers, simdgroup_operations, accesses, shared_bytes;
};
struct Launch {
  void (*entry)(void* const*, const struct ThreadIds*);
  Buffer* buffers;
  uint32_t buffer_count, grid[3], threadgroup[3];
  uint32_t order, seed, checked, collect;
  uint64_t loop_limit;  // branches one thread may take
};
// The thread attributes of Metal that kernels may name; source.py copies this structure into the kernel's unit.
struct ThreadIds {
  uint32_t thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
  uint32_t threads_per_grid[3], threads_per_threadgroup[3], threadgroups_per_grid[3];
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup, threads_per_simdgroup;
};
extern "C" char __start_msl_shared[] __attribute__((weak)), __stop_msl_shared[] __attribute__((weak));
extern "C" char __ehdr_start[] __attribute__((visibility("hidden"))), _end[] __attribute__((visibility("hidden")));

namespace {
const uint32_t LANES = 32, MAX_THREADS = 1024, MAX_SITES = 4096;
const size_t STACK = 64 << 10, BELOW_STACKS = 1 << 20, MARGIN = 64 << 10, LINE = 128, MAX_SHARED = 32 << 10;
const uintptr_t NULL_PAGE = 4096;
const uint64_t CANARY = 0x5afe57acc0de0000;  // in the last word of a stack

template <class T>
struct Array {  // zeroed, growing; no C++ standard library, so that nothing but libc is needed
  T* items = nullptr;
  size_t size = 0;
  void reset(size_t n) {
    free(items);
    items = (T*)calloc(n ? n : 1, sizeof(T));
    size = n;
  }
  void grow(size_t n) {
    if (n <= size) return;
    n = n < 2 * size ? 2 * size : n + 8;
    items = (T*)realloc((void*)items, n * sizeof(T));
    memset((void*)(items + size), 0, (n - size) * sizeof(T));
    size = n;
  }
  T& operator[](size_t i) { return items[i]; }
};

struct Site {  // metal_stdlib has the same
  const char* file;
  int line, column;
};
enum State { READY, IN_EXCHANGE, AT_SIMD_BARRIER, AT_BARRIER, FINISHED };
struct Lane {
  void* stack_pointer;
  char* stack;
  State state;
  const char* what;
  Site at;
  uint32_t flags;
  uint64_t branches;
  ThreadIds ids;
};
struct Simdgroup {
  alignas(64) char slots[2][LANES * 64];  // two, because a fast lane may enter the next exchange while others still read this one
  int turn;
  uint32_t epoch;  // simdgroup barriers passed
};
struct Cell {  // shadow of one byte. A thread is its number in the grid + 1; an epoch counts barriers
  uint32_t writer, write_epoch, write_simd_epoch;
  uint32_t reader, read_epoch, read_simd_epoch;
  bool filled;
  bool many;  // several lanes of the reader's simdgroup have read since its last barrier
  bool wide;  // several simdgroups have read since the last threadgroup barrier
  bool everywhere;  // several threadgroups have read
};
struct Region {
  char *begin, *end;
  const Buffer* buffer;
  BufferKind kind;
  Array<Cell> cells;             // of all but inputs
  Array<uint8_t> seen, changed;  // a bit per byte, for the traffic report
  Array<uint32_t> visitor;       // of each line: the last threadgroup that touched it, + 1
  Traffic traffic;
};
struct Access {  // one instruction of one simdgroup: what its lanes asked for
  Region* region;
  uint32_t count;
  char* address[LANES];
  uint8_t size[LANES];
};
struct CodeSite {
  const void* pc;
  uint32_t turns[LANES];  // how often each lane has passed since the last standstill
  uint32_t used;
  Array<Access> accesses;
};

Launch run;
Lane lanes[MAX_THREADS];
Simdgroup simdgroups[MAX_THREADS / LANES];
char* stacks;
Region regions[33];
uint32_t region_count, group_threads, group_number, random_state;
uint32_t epoch_shared, epoch_device;
CodeSite sites[MAX_SITES];
uint32_t site_list[MAX_SITES], site_count;
void* const* kernel_buffers;
void* scheduler;
Lane* lane;        // the one that runs, or null
Simdgroup* simd;   // its simdgroup
bool failed;
Counts counts;
char* message;
size_t message_size;

// ---- fibers ------------------------------------------------------------------------------------------------------------
extern "C" void msl_switch(void** save, void* to);  // saves what a call must preserve, and changes the stack
#if defined(__x86_64__)
asm(R"(
.text
.hidden msl_switch
.globl msl_switch
msl_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.section .note.GNU-stack,"",@progbits
.text
)");
const size_t FRAME = 64, RETURN_SLOT = 6;  // six registers, the return address, one word so that the stack is aligned
unsigned flush_denormals(bool on, unsigned old) {  // as Metal does (its compiler says air.compile.denorms_disable)
  unsigned now = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(on ? now | 0x8040 : old);
  return now;
}
#elif defined(__aarch64__)
asm(R"(
.text
.hidden msl_switch
.globl msl_switch
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.section .note.GNU-stack,"",@progbits
.text
)");
const size_t FRAME = 160, RETURN_SLOT = 11;  // x30
unsigned flush_denormals(bool on, unsigned old) {
  uint64_t now;
  asm volatile("mrs %0, fpcr" : "=r"(now));
  uint64_t next = on ? now | 1u << 24 : old;
  asm volatile("msr fpcr, %0" ::"r"(next));
  return (unsigned)now;
}
#else
#error "no context switch for this processor"
#endif

void wait(State state) {
  Lane* me = lane;
  me->state = state;
  msl_switch(&me->stack_pointer, scheduler);
}
void fiber() {
  run.entry(kernel_buffers, &lane->ids);
  wait(FINISHED);
}
void start(Lane& l) {
  *(uint64_t*)l.stack = CANARY;
  void** frame = (void**)(l.stack + STACK - FRAME);
  memset(frame, 0, FRAME);
  frame[RETURN_SLOT] = (void*)fiber;
  l.stack_pointer = frame;
  l.state = READY;
  l.branches = 0;
}

// ---- errors ------------------------------------------------------------------------------------------------------------
// "kind \t address in the library, hexadecimal, or 0 \t text": Python turns the address into file:line.
void fail(const char* kind, const void* pc, const char* format, ...) {
  if (failed) return;
  failed = true;
  int n = snprintf(message, message_size, "%s\t%lx\t", kind, pc ? (unsigned long)((const char*)pc - __ehdr_start - 1) : 0ul);
  va_list arguments;
  va_start(arguments, format);
  n += vsnprintf(message + n, message_size - n, format, arguments);
  va_end(arguments);
  if (lane && n < (int)message_size) {
    const ThreadIds& i = lane->ids;
    const uint32_t *t = i.thread_position_in_threadgroup, *g = i.threadgroup_position_in_grid;
    snprintf(message + n, message_size - n, "; by thread (%u, %u, %u) of threadgroup (%u, %u, %u): simdgroup %u, lane %u",
             t[0], t[1], t[2], g[0], g[1], g[2], i.simdgroup_index_in_threadgroup, i.thread_index_in_simdgroup);
  }
  if (lane) wait(FINISHED);  // never comes back
}

const char* const TOO_DEEP = "a thread uses more than 64 KB of its own, or a pointer to another thread's variable";

// ---- memory ------------------------------------------------------------------------------------------------------------
uint32_t thread_number(const Lane* l) { return group_number * group_threads + l->ids.thread_index_in_threadgroup + 1; }
uint32_t group_of(uint32_t thread) { return (thread - 1) / group_threads; }
uint32_t simd_of(uint32_t thread) { return (thread - 1) % group_threads / LANES; }
// Whether all that `other` did at these epochs is over before what `me` does now.
bool before(uint32_t other, uint32_t epoch, uint32_t simd_epoch, uint32_t me, uint32_t now) {
  if (other == me) return true;
  if (group_of(other) != group_of(me)) return false;  // threadgroups of one launch are never ordered
  if (epoch != now) return true;
  return simd_of(other) == simd_of(me) && simd_epoch != simd->epoch;
}
void check(Region& r, char* address, unsigned size, bool is_write, const void* pc) {
  const uint32_t me = thread_number(lane), now = r.kind == SHARED ? epoch_shared : epoch_device;
  for (unsigned i = 0; i < size; ++i) {
    const long offset = address - r.begin + i;
    Cell& c = r.cells[offset];
    if (c.writer && !before(c.writer, c.write_epoch, c.write_simd_epoch, me, now)) {
      return fail("data race", pc, "%s of byte %ld of '%s', which thread %u of threadgroup %u wrote with no barrier between",
                  is_write ? "write" : "read", offset, r.buffer->name, (c.writer - 1) % group_threads, group_of(c.writer));
    }
    const bool same_group = c.reader && group_of(c.reader) == group_of(me), current = same_group && c.read_epoch == now;
    const bool neighbour = current && simd_of(c.reader) == simd_of(me), recent = neighbour && c.read_simd_epoch == simd->epoch;
    if (is_write) {
      if (c.everywhere)
        return fail("data race", pc, "write of byte %ld of '%s', which several threadgroups read", offset, r.buffer->name);
      if (c.reader && (!same_group || (current && (c.wide || !neighbour || (recent && (c.many || c.reader != me)))))) {
        return fail("data race", pc, "write of byte %ld of '%s', which thread %u of threadgroup %u read with no barrier between",
                    offset, r.buffer->name, (c.reader - 1) % group_threads, group_of(c.reader));
      }
      c.writer = me, c.write_epoch = now, c.write_simd_epoch = simd->epoch, c.filled = true;
    } else {
      if (!c.filled) return fail("uninitialised read", pc, "byte %ld of '%s'", offset, r.buffer->name);
      c.everywhere |= c.reader && !same_group;
      c.wide = current && (c.wide || !neighbour);
      c.many = recent && (c.many || c.reader != me);
      c.reader = me, c.read_epoch = now, c.read_simd_epoch = simd->epoch;
    }
  }
}
void mark(Array<uint8_t>& bits, size_t offset, unsigned size) {
  for (unsigned i = 0; i < size;) {
    const size_t at = offset + i;
    if (at % 8 == 0 && size - i >= 8) {
      bits[at / 8] = 255;
      i += 8;
    } else {
      bits[at / 8] |= 1 << at % 8;
      ++i;
    }
  }
}
void note(Region& r, char* address, unsigned size, bool is_write, const void* pc) {
  (is_write ? r.traffic.written : r.traffic.read) += size;
  if (r.kind == SHARED) return;
  mark(is_write ? r.changed : r.seen, address - r.begin, size);
  for (size_t line = (address - r.begin) / LINE, last = (address - r.begin + size - 1) / LINE; line <= last; ++line) {
    uint32_t& visitor = r.visitor[line];
    if (visitor == group_number + 1) continue;
    r.traffic.touched_lines += visitor == 0, r.traffic.fetched_lines++;
    visitor = group_number + 1;
  }
  uint32_t h = (uint32_t)((uintptr_t)pc * 2654435761u >> 7) % MAX_SITES;
  while (sites[h].pc && sites[h].pc != pc) h = (h + 1) % MAX_SITES;
  CodeSite& s = sites[h];
  if (!s.pc) {
    if (site_count == MAX_SITES / 2) return fail("too large", pc, "more than %u loads and stores in the code", site_count);
    s.pc = pc;
    site_list[site_count++] = h;
  }
  const uint32_t turn = s.turns[lane->ids.thread_index_in_simdgroup]++;
  s.accesses.grow(turn + 1);
  if (turn >= s.used) s.used = turn + 1;
  Access& a = s.accesses[turn];
  a.region = &r;
  for (uint32_t i = 0; i < a.count; ++i)
    if (a.address[i] == address && a.size[i] == size) return;  // lanes that read the same bytes ask once
  a.address[a.count] = address;
  a.size[a.count++] = (uint8_t)size;
}
void settle_lines() {  // at a standstill of a simdgroup: the same turn of the same instruction is one access
  for (uint32_t i = 0; i < site_count; ++i) {
    CodeSite& s = sites[site_list[i]];
    for (uint32_t turn = 0; turn < s.used; ++turn) {
      Access& a = s.accesses[turn];
      uint64_t lines[2 * LANES], bytes = 0;
      uint32_t n = 0;
      for (uint32_t k = 0; k < a.count; ++k) {
        bytes += a.size[k];
        for (uint64_t line = (a.address[k] - a.region->begin) / LINE; line <= (a.address[k] + a.size[k] - 1 - a.region->begin) / LINE; ++line) {
          uint32_t j = 0;
          while (j < n && lines[j] != line) ++j;
          if (j == n) lines[n++] = line;
        }
      }
      if (a.count) a.region->traffic.accesses++, a.region->traffic.lines += n, a.region->traffic.least_lines += (bytes + LINE - 1) / LINE;
      a.count = 0;
    }
    s.used = 0;
    memset(s.turns, 0, sizeof s.turns);
  }
}
void touch(void* where, unsigned size, bool is_write, const void* pc) {
  if (!lane || failed) return;
  char* a = (char*)where;
  ++counts.accesses;
  if (a >= lane->stack && a + size <= lane->stack + STACK) return;  // the thread's own variables
  static uint32_t last;
  Region* r = nullptr;
  if (last < region_count && a >= regions[last].begin && a + size <= regions[last].end) r = &regions[last];
  for (uint32_t i = 0; !r && i < region_count; ++i)
    if (a >= regions[i].begin && a + size <= regions[i].end) r = &regions[last = i];
  if (!r) {
    if (a >= stacks - BELOW_STACKS && a < stacks + MAX_THREADS * STACK) return fail("private memory", pc, TOO_DEEP);
    if (!is_write && a >= __ehdr_start && a + size <= _end && !(a >= __start_msl_shared && a < __stop_msl_shared)) return;  // tables
    if ((uintptr_t)a < NULL_PAGE) return fail("null pointer", pc, "%s of %u bytes", is_write ? "write" : "read", size);
    const Region* nearest = nullptr;
    unsigned long best = ~0ul;
    for (uint32_t i = 0; i < region_count; ++i) {
      const unsigned long d = a < regions[i].begin ? regions[i].begin - a : a - regions[i].end + 1;
      if (d < best) best = d, nearest = &regions[i];
    }
    return fail("out of bounds", pc, "%s of %u bytes at byte %ld of '%s', which has %ld", is_write ? "write" : "read", size,
                (long)(a - nearest->begin), nearest->buffer->name, (long)(nearest->end - nearest->begin));
  }
  if ((uintptr_t)a % size)
    return fail("misaligned", pc, "%s of %u bytes at byte %ld of '%s'", is_write ? "write" : "read", size, (long)(a - r->begin), r->buffer->name);
  if (r->kind == INPUT && is_write) return fail("write to an input", pc, "byte %ld of '%s'", (long)(a - r->begin), r->buffer->name);
  if (r->kind != INPUT) check(*r, a, size, is_write, pc);
  if (run.collect) note(*r, a, size, is_write, pc);
}
}  // namespace

// ---- what clang's instrumentation calls ------------------------------------------------------------------------------
#define LOAD_STORE(n)                                                                                            \
  extern "C" void __sanitizer_cov_load##n(void* p) { touch(p, n, false, __builtin_return_address(0)); } \
  extern "C" void __sanitizer_cov_store##n(void* p) { touch(p, n, true, __builtin_return_address(0)); }
LOAD_STORE(1) LOAD_STORE(2) LOAD_STORE(4) LOAD_STORE(8) LOAD_STORE(16)
extern "C" void __sanitizer_cov_trace_pc_guard_init(uint32_t*, uint32_t*) {}
extern "C" void __sanitizer_cov_trace_pc_guard(uint32_t*) {
  if (lane && ++lane->branches > run.loop_limit)
    fail("endless loop", __builtin_return_address(0), "one thread has taken %lu branches", (unsigned long)run.loop_limit);
}
#define UNDEFINED(handler, what, ...) \
  extern "C" void __ubsan_handle_##handler(void*, ##__VA_ARGS__) { if (lane) fail(what, __builtin_return_address(0), "undefined in Metal"); }
extern "C" void __ubsan_handle_out_of_bounds(void*, void* index) {
  if (lane) fail("out of bounds", __builtin_return_address(0), "index %ld of an array", (long)index);
}
UNDEFINED(shift_out_of_bounds, "shift by too much", void*, void*)
UNDEFINED(divrem_overflow, "division by zero", void*, void*)
UNDEFINED(float_cast_overflow, "float outside the integer's range", void*)
UNDEFINED(add_overflow, "signed overflow", void*, void*)
UNDEFINED(sub_overflow, "signed overflow", void*, void*)
UNDEFINED(mul_overflow, "signed overflow", void*, void*)
UNDEFINED(negate_overflow, "signed overflow", void*)
UNDEFINED(builtin_unreachable, "end of a function without a value")
UNDEFINED(missing_return, "end of a function without a value")
// compiler-rt has this, and older libgcc has not: round to nearest, ties to even, NaN stays NaN
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint16_t top = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  __bf16 r;
  memcpy(&r, &top, 2);
  return r;
}

// ---- what metal_stdlib calls -----------------------------------------------------------------------------------------
extern "C" uint32_t msl_lane(void) { return lane->ids.thread_index_in_simdgroup; }
extern "C" const char* msl_exchange(const char* what, const void* value, int bytes, const Site* at) {
  const char* slots = simd->slots[simd->turn];
  memcpy((char*)slots + 64 * msl_lane(), value, bytes);
  lane->what = what, lane->at = *at;
  wait(IN_EXCHANGE);
  return slots;
}
extern "C" void msl_barrier(const char* what, bool whole_threadgroup, uint32_t flags, const Site* at) {
  lane->what = what, lane->at = *at, lane->flags = flags;
  wait(whole_threadgroup ? AT_BARRIER : AT_SIMD_BARRIER);
}

// ---- the scheduler -----------------------------------------------------------------------------------------------------
namespace {
uint32_t random_below(uint32_t n) {
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) % n;
}
void arrange(uint32_t* order, uint32_t n) {  // run.order: 0 forward, 1 reverse, 2 random
  for (uint32_t i = 0; i < n; ++i) order[i] = run.order == 1 ? n - 1 - i : i;
  if (run.order != 2) return;
  for (uint32_t i = n; i > 1; --i) {
    const uint32_t j = random_below(i), t = order[i - 1];
    order[i - 1] = order[j], order[j] = t;
  }
}
bool together(const Lane& a, const Lane& b) {
  if (a.state != b.state) return false;
  if (a.state == FINISHED) return true;
  return a.at.line == b.at.line && a.at.column == b.at.column && !strcmp(a.at.file, b.at.file) && !strcmp(a.what, b.what);
}
void diverged(const char* kind, uint32_t first, uint32_t last) {  // lists runs of threads that stand together
  char text[600];
  size_t n = 0;
  for (uint32_t i = first, j; i < last && n < sizeof text - 120; i = j) {
    for (j = i; j < last && together(lanes[j], lanes[i]);) ++j;
    n += snprintf(text + n, sizeof text - n, "%sthreads %u to %u ", n ? "; " : "", i, j - 1);
    const Lane& l = lanes[i];
    if (l.state == FINISHED) n += snprintf(text + n, sizeof text - n, "have finished");
    else n += snprintf(text + n, sizeof text - n, "wait in %s at %s:%d:%d", l.what, l.at.file, l.at.line, l.at.column);
  }
  fail(kind, nullptr, "%s; threadgroup %u", text, group_number);
}
// Runs one simdgroup until all its lanes have finished or stand at a threadgroup barrier.
void run_simdgroup(uint32_t first, uint32_t last) {
  uint32_t order[LANES];
  for (;;) {
    arrange(order, last - first);
    for (uint32_t i = 0; i < last - first; ++i) {
      Lane& l = lanes[first + order[i]];
      if (l.state != READY) continue;
      lane = &l;
      msl_switch(&scheduler, l.stack_pointer);
      lane = nullptr;
      if (*(uint64_t*)l.stack != CANARY) fail("private memory", nullptr, "%s; threadgroup %u", TOO_DEEP, group_number);
      if (failed) return;
    }
    if (run.collect) settle_lines();
    const Lane& l = lanes[first];
    for (uint32_t i = first; i < last; ++i)
      if (!together(lanes[i], l)) return diverged("divergent lanes", first, last);
    if (l.state == FINISHED || l.state == AT_BARRIER) return;
    if (l.state == IN_EXCHANGE) {
      if (last - first < LANES) return diverged("incomplete simdgroup", first, last);
      simd->turn ^= 1;
      ++counts.simdgroup_operations;
    } else {
      if (l.flags) ++simd->epoch;
      ++counts.simdgroup_barriers;
    }
    for (uint32_t i = first; i < last; ++i) lanes[i].state = READY;
  }
}
void run_threadgroup() {
  const uint32_t simds = (group_threads + LANES - 1) / LANES;
  uint32_t order[MAX_THREADS / LANES];
  for (;;) {
    arrange(order, simds);
    for (uint32_t i = 0; i < simds && !failed; ++i) {
      const uint32_t first = order[i] * LANES, last = first + LANES < group_threads ? first + LANES : group_threads;
      simd = &simdgroups[order[i]];
      if (lanes[first].state == READY) run_simdgroup(first, last);
    }
    if (failed) return;
    for (uint32_t i = 0; i < group_threads; ++i)
      if (!together(lanes[i], lanes[0])) return diverged("divergent threads", 0, group_threads);
    if (lanes[0].state == FINISHED) return;
    ++counts.threadgroup_barriers;
    if (lanes[0].flags & 1) ++epoch_device;
    if (lanes[0].flags & 2) ++epoch_shared;
    for (uint32_t i = 0; i < group_threads; ++i) lanes[i].state = READY;
  }
}
void set_up_threadgroup(const uint32_t* groups) {
  const uint32_t* size = run.threadgroup;
  const uint32_t g[3] = {group_number % groups[0], group_number / groups[0] % groups[1], group_number / groups[0] / groups[1]};
  for (uint32_t i = 0; i < group_threads; ++i) {
    Lane& l = lanes[i];
    ThreadIds& d = l.ids;
    const uint32_t p[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int k = 0; k < 3; ++k) {
      d.thread_position_in_threadgroup[k] = p[k];
      d.threadgroup_position_in_grid[k] = g[k];
      d.thread_position_in_grid[k] = g[k] * size[k] + p[k];
      d.threads_per_grid[k] = run.grid[k];
      d.threads_per_threadgroup[k] = size[k];
      d.threadgroups_per_grid[k] = groups[k];
    }
    d.thread_index_in_threadgroup = i;
    d.thread_index_in_simdgroup = i % LANES;
    d.simdgroup_index_in_threadgroup = i / LANES;
    d.simdgroups_per_threadgroup = (group_threads + LANES - 1) / LANES;
    d.threads_per_simdgroup = LANES;
    l.stack = stacks + i * STACK;
    start(l);
  }
  memset(simdgroups, 0, sizeof simdgroups);
  epoch_shared = epoch_device = 0;
  if (counts.shared_bytes) memset(__start_msl_shared, 0xFF, counts.shared_bytes);  // NaN in every float format
  for (uint32_t i = 0; i < region_count; ++i)
    if (regions[i].kind == SHARED) memset(regions[i].cells.items, 0, regions[i].cells.size * sizeof(Cell));
}
void add_region(char* begin, const Buffer* b) {
  Region& r = regions[region_count++];
  r.begin = begin, r.end = begin + b->size, r.buffer = b, r.kind = (BufferKind)b->kind;
  memset(&r.traffic, 0, sizeof r.traffic);
  r.cells.reset(b->kind == INPUT ? 0 : b->size);
  if (b->filled || r.kind == WRITTEN) for (uint64_t i = 0; i < b->size; ++i) r.cells[i].filled = true;
  if (run.collect) r.seen.reset(b->size / 8 + 1), r.changed.reset(b->size / 8 + 1), r.visitor.reset(b->size / LINE + 1);
}
uint64_t ones(Array<uint8_t>& bits) {
  uint64_t n = 0;
  for (size_t i = 0; i < bits.size; ++i) n += __builtin_popcount(bits[i]);
  return n;
}
}  // namespace

// Returns 0, or 1 with the first error in `text`. traffic has a place per buffer and one more, for threadgroup memory.
extern "C" int msl_run(const Launch* launch, char* text, uint64_t text_size, Traffic* traffic, Counts* totals) {
  run = *launch;
  message = text, message_size = text_size, text[0] = 0;
  failed = false, lane = nullptr, region_count = 0, random_state = run.seed;
  memset(&counts, 0, sizeof counts);
  settle_lines();
  counts.shared_bytes = __start_msl_shared ? __stop_msl_shared - __start_msl_shared : 0;
  group_threads = run.threadgroup[0] * run.threadgroup[1] * run.threadgroup[2];
  uint32_t groups[3], group_count = 1;
  for (int k = 0; k < 3; ++k) groups[k] = run.grid[k] / run.threadgroup[k], group_count *= groups[k];
  if (counts.shared_bytes > MAX_SHARED)
    fail("threadgroup memory", nullptr, "%lu bytes; Metal allows %zu", (unsigned long)counts.shared_bytes, MAX_SHARED);

  // With checks, a kernel works on copies with a margin, so that an index that is a little off meets no other buffer.
  char* base[32] = {};
  char* copies[32] = {};
  Buffer shared = {__start_msl_shared, counts.shared_bytes, SHARED, 0, "threadgroup memory"};
  for (uint32_t i = 0; i < run.buffer_count; ++i) {
    const Buffer& b = run.buffers[i];
    base[i] = (char*)b.data;
    if (!run.checked) continue;
    copies[i] = (char*)malloc(b.size + 2 * MARGIN + LINE);
    base[i] = (char*)(((uintptr_t)copies[i] + MARGIN + LINE - 1) / LINE * LINE);
    if (b.kind != OUTPUT || b.filled) memcpy(base[i], b.data, b.size);
    else memset(base[i], 0xFF, b.size);
    add_region(base[i], &b);
  }
  if (run.checked && counts.shared_bytes) add_region(__start_msl_shared, &shared);
  kernel_buffers = (void* const*)base;
  char* const all_stacks = (char*)aligned_alloc(16, BELOW_STACKS + MAX_THREADS * STACK);
  stacks = all_stacks + BELOW_STACKS;

  const unsigned old = flush_denormals(true, 0);
  for (uint32_t i = 0; i < group_count && !failed; ++i) {
    group_number = run.order == 1 ? group_count - 1 - i : run.order == 2 ? (i + run.seed) % group_count : i;
    set_up_threadgroup(groups);
    run_threadgroup();
  }
  lane = nullptr;
  flush_denormals(false, old);

  for (uint32_t i = 0; i < region_count; ++i) {
    Region& r = regions[i];
    if (r.kind == OUTPUT || r.kind == WRITTEN) {
      uint64_t missing = 0, first = 0;
      for (uint64_t k = r.cells.size; k-- > 0;)
        if (!r.cells[k].filled) ++missing, first = k;
      if (missing) fail("output not written", nullptr, "%lu of %lu bytes of '%s', from byte %lu on", (unsigned long)missing,
                        (unsigned long)r.buffer->size, r.buffer->name, (unsigned long)first);
      memcpy(r.buffer->data, r.begin, r.buffer->size);
    }
    if (run.collect) r.traffic.unique_read = ones(r.seen), r.traffic.unique_written = ones(r.changed);
    traffic[r.kind == SHARED ? run.buffer_count : i] = r.traffic;
    r.cells.reset(0), r.seen.reset(0), r.changed.reset(0), r.visitor.reset(0);
  }
  for (uint32_t i = 0; i < run.buffer_count; ++i) free(copies[i]);
  free(all_stacks);
  *totals = counts;
  return failed;
}
