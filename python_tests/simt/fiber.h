// Stacks, and switching between them.  Included only by simt.cpp.
//
// swapcontext would make a system call per switch, for the signal mask.  The sanitizers offer functions to follow the switches.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#endif

#if !defined(SIMT_UCONTEXT) && !(defined(__LP64__) && (defined(__x86_64__) || defined(__aarch64__)))
#define SIMT_UCONTEXT 1
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

extern "C" {
#ifdef SIMT_ASAN
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
#endif
#ifdef SIMT_TSAN
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
#endif
#ifndef SIMT_UCONTEXT
// Saves the callee-saved registers on the current stack and its pointer in *from, then resumes the stack `to`.
void simt_switch_stack(void** from, void* to);
#endif
}

#if !defined(SIMT_UCONTEXT) && defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .globl simt_switch_stack
    .hidden simt_switch_stack
    .type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    ldmxcsr (%rsp)
    fldcw 4(%rsp)
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch_stack, . - simt_switch_stack
)");
#elif !defined(SIMT_UCONTEXT)
asm(R"(
    .text
    .p2align 4
    .globl simt_switch_stack
    .hidden simt_switch_stack
    .type simt_switch_stack, %function
simt_switch_stack:
    sub sp, sp, #176
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
    mrs x9, fpcr
    str x9, [sp, #160]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldr x9, [sp, #160]
    msr fpcr, x9
    ldp d14, d15, [sp, #144]
    ldp d12, d13, [sp, #128]
    ldp d10, d11, [sp, #112]
    ldp d8, d9, [sp, #96]
    ldp x29, x30, [sp, #80]
    ldp x27, x28, [sp, #64]
    ldp x25, x26, [sp, #48]
    ldp x23, x24, [sp, #32]
    ldp x21, x22, [sp, #16]
    ldp x19, x20, [sp, #0]
    add sp, sp, #176
    ret
    .size simt_switch_stack, . - simt_switch_stack

    .globl simt_start_fiber
    .hidden simt_start_fiber
    .type simt_start_fiber, %function
simt_start_fiber:
    mov x16, x19
    mov x30, xzr
    br x16
    .size simt_start_fiber, . - simt_start_fiber
)");
extern "C" void simt_start_fiber();   // calls the function in x19, without a return address, so that backtraces end here
#endif

namespace simt {

#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr size_t kStackBytes = 256 << 10;   // frames are larger, and the sanitizer writes its report on the faulting stack
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Stacks of kStackBytes, each above a guard page; reused by later launches.
class StackPool {
 public:
  char* take() {
    if (idle_.empty()) return map();
    char* const bottom = idle_.back();
    idle_.pop_back();
#ifdef SIMT_ASAN
    __asan_unpoison_memory_region(bottom, kStackBytes);
#endif
    return bottom;
  }

  void release_stack(char* bottom) {
#ifdef SIMT_ASAN
    __asan_poison_memory_region(bottom, kStackBytes);   // dangling pointers must not reach into it
#endif
    idle_.push_back(bottom);
  }

  static void unmap(char* bottom) { munmap(bottom - guard_bytes(), guard_bytes() + kStackBytes); }

 private:
  static size_t guard_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  static char* map() {
    void* const pages =
        mmap(nullptr, guard_bytes() + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, guard_bytes(), PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<char*>(pages) + guard_bytes();
  }

  std::vector<char*> idle_;
};

// A thread of execution: a CUDA thread on a stack of the pool, or the host on its own stack.
class Fiber {
 public:
  // Makes this the fiber of the caller.
  void adopt_host() {
    bottom_ = nullptr;   // entered() sets it
    size_ = 0;
#ifdef SIMT_TSAN
    tsan_fiber_ = __tsan_get_current_fiber();
#endif
  }

  // The first switch to this fiber starts `entry`, which must call entered() first and must not return.
  void prepare(char* bottom, void (*entry)(), const char* name) {
    bottom_ = bottom;
    size_ = kStackBytes;
    fake_stack_ = nullptr;
    write_first_frame(entry);
#ifdef SIMT_TSAN
    tsan_fiber_ = __tsan_create_fiber(0);
    __tsan_set_fiber_name(tsan_fiber_, name);
#else
    static_cast<void>(name);
#endif
  }

  enum class Exit { suspend, finish };

  void switch_to(Fiber& next, Exit exit_kind) {
    announce(next, exit_kind);
#ifdef SIMT_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    simt_switch_stack(&stack_pointer_, next.stack_pointer_);
#endif
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // A fiber calls this when it starts.  The first one of a launch comes from the host.
  static void entered(Fiber& host) {
#ifdef SIMT_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!host.bottom_) {
      host.bottom_ = static_cast<const char*>(bottom);
      host.size_ = size;
    }
#else
    static_cast<void>(host);
#endif
  }

  // Calls `report` as this fiber, which is suspended and will not run again; called by the host.
  template <class Function>
  void abandon(Fiber& host, Function report) {
    host.announce(*this, Exit::suspend);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
    report();
    announce(host, Exit::finish);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(host.fake_stack_, nullptr, nullptr);
#endif
  }

  void forget() {
#ifdef SIMT_TSAN
    if (tsan_fiber_) __tsan_destroy_fiber(tsan_fiber_);
    tsan_fiber_ = nullptr;
#endif
  }

 private:
  // Announces the next stack to the sanitizers.  No instrumented code may run between this and the switch.
  void announce([[maybe_unused]] Fiber& next, [[maybe_unused]] Exit exit_kind) {
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(exit_kind == Exit::finish ? nullptr : &fake_stack_, next.bottom_, next.size_);
#endif
#ifdef SIMT_TSAN
    constexpr unsigned kOrdersNothing = 1;
    __tsan_switch_to_fiber(next.tsan_fiber_, kOrdersNothing);
#endif
  }

#if defined(SIMT_UCONTEXT)
  void write_first_frame(void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = const_cast<char*>(bottom_);
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  ucontext_t context_;
#else
  // The frame that simt_switch_stack would have left, had `entry` called it first.
  void write_first_frame(void (*entry)()) {
    char* const top = const_cast<char*>(bottom_) + size_;
#if defined(__x86_64__)
    struct Frame {
      uint32_t mxcsr;
      uint16_t x87_control_word, unused;
      uint64_t r15, r14, r13, r12, rbx, rbp;
      void (*return_address)();
      uint64_t caller_of_entry;   // null, so that backtraces end here; `entry` finds the stack aligned as after a call
    };
    Frame* const frame = new (top - sizeof(Frame)) Frame{};
    asm("stmxcsr %0" : "=m"(frame->mxcsr));
    asm("fnstcw %0" : "=m"(frame->x87_control_word));
    frame->return_address = entry;
#else
    struct Frame {
      void (*x19)();
      uint64_t x20_to_x28[9];
      uint64_t frame_pointer;
      void (*link_register)();
      uint64_t d8_to_d15[8];
      uint64_t fpcr, unused;
    };
    Frame* const frame = new (top - sizeof(Frame)) Frame{};
    asm volatile("mrs %0, fpcr" : "=r"(frame->fpcr));
    frame->x19 = entry;
    frame->link_register = simt_start_fiber;
#endif
    stack_pointer_ = frame;
  }
  void* stack_pointer_ = nullptr;
#endif

  const char* bottom_ = nullptr;
  size_t size_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
  [[maybe_unused]] void* tsan_fiber_ = nullptr;
};

}   // namespace simt
