// The way of one row's threads over its classes, the same in both directions.
#pragma once
#include <type_traits>

#include "cuda/words.cuh"

namespace kcd::cuda {

constexpr int kOctet = 8;

// The part of a row that the threads of one block walk: classes begin to end, in octets from `first` on, where a word of the
// leading tensor begins (the student's when it is read, the gradient's when it is written).
struct Part {
  int begin, first, end;
};

KCD_DEVICE Part part_of(const Row& leading, int classes, int part, int parts) {
  const int to_word = (kWordBytes - offset_of(leading.begin)) % kWordBytes / leading.size;
  const int head = to_word < classes ? to_word : classes;
  const int share = ((classes - head) / kOctet + parts - 1) / parts * kOctet;
  const int first = head + part * share, end = part == parts - 1 ? classes : first + share;
  return {part == 0 ? 0 : first < classes ? first : classes, first < classes ? first : classes, end < classes ? end : classes};
}

// Whole octets of float32 and 16-bit rows.  Calls visit.octet<sizes>(student's, teacher's, first, second): the octets' classes are
// first to first + 3 and second to second + 3.  Returns the class it came to; what is left is less than what the threads read at a
// time, as often in every thread.  A row that is not there is not read.
//
// Each thread reads two words of each tensor at a time.  They lie `threads` words apart, so that a warp always reads neighbouring
// words: one octet of float32, or two of 16-bit logits.  Where the tensors' words hold different numbers of classes each thread
// reads the neighbouring words of one octet.
template <int kStudentSize, int kTeacherSize, class Visit>
KCD_DEVICE int walk_octets(const char* student, const char* teacher, int first, int end, int thread, int threads,
                           const Visit& visit) {
  constexpr bool kApart = kStudentSize == kTeacherSize, kTwo = kApart && kStudentSize == 2;
  constexpr int kClasses = kApart ? kWordBytes / kStudentSize : kOctet;   // a thread's neighbouring ones
  const int distance = kApart ? threads * kClasses : kQuad, step = threads * (kTwo ? 2 * kOctet : kOctet);
  for (; end - first >= step; first += step) {
    int one = first + thread * kClasses;
    Octet z{}, y{};
    if (student) {
      z.word[0] = load_word(student + int64_t{one} * kStudentSize);
      if (kApart || kStudentSize == 4) z.word[1] = load_word(student + int64_t{one + distance} * kStudentSize);
    }
    if (teacher) {
      y.word[0] = load_word(teacher + int64_t{one} * kTeacherSize);
      if (kApart || kTeacherSize == 4) y.word[1] = load_word(teacher + int64_t{one + distance} * kTeacherSize);
    }
#pragma unroll 1
    for (int half = 0; half < (kTwo ? 2 : 1); ++half) {
      visit.template octet<kStudentSize, kTeacherSize>(z, y, one, kTwo ? one + kQuad : one + distance);
      one += distance;
      z.word[0] = z.word[1];
      y.word[0] = y.word[1];
    }
  }
  return first;
}

// Classes begin to first and last to end, four at a time: visit.quad(class, how many of the four there are), as often in every
// thread.
template <class Visit>
KCD_DEVICE void walk_quads(int begin, int first, int last, int end, int thread, int threads, const Visit& visit) {
  const int before = (first - begin + kQuad - 1) / kQuad, quads = before + (end - last + kQuad - 1) / kQuad;
  for (int done = 0; done < quads; done += threads) {
    const int quad = done + thread;
    const int c = quad < before ? begin + quad * kQuad : last + (quad - before) * kQuad;
    const int left = quad < before ? first - c : end - c;
    visit.quad(c, left < 0 ? 0 : left < kQuad ? left : kQuad);
  }
}

template <class Real, class Visit>
KCD_DEVICE void walk(const Row& leading, const Row& student, const Row& teacher, const Part& part, int thread, int threads,
                     const Visit& visit) {
  int first = part.first, last = part.first;
  if constexpr (sizeof(Real) == 4) {
    int end = part.end;
    if ((student.begin && offset_of(student.at(first))) ||
        (teacher.begin &&
         offset_of(teacher.at(first)))) {   // what is read around a word that is not aligned must lie in the row too
      first = last = first + kOctet < end ? first + kOctet : end;
      end -= kOctet;
    }
    const auto over = [&](auto student_size, auto teacher_size) {
      last = walk_octets<student_size.value, teacher_size.value>(student.begin, teacher.begin, first, end, thread, threads, visit);
    };
    using Two = std::integral_constant<int, 2>;
    using Four = std::integral_constant<int, 4>;
    const int teacher_size = teacher.begin ? teacher.size : leading.size;
    if (leading.size == 2 && teacher_size == 2) over(Two{}, Two{});
    if (leading.size == 4 && teacher_size == 4) over(Four{}, Four{});
    if (leading.size == 2 && teacher_size == 4) over(Two{}, Four{});
    if (leading.size == 4 && teacher_size == 2) over(Four{}, Two{});
  }
  walk_quads(part.begin, first, last, part.end, thread, threads, visit);
}

}   // namespace kcd::cuda
