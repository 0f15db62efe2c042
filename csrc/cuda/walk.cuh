// The way of one row's threads over its classes, the same in both directions.
#pragma once
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

// Whole octets of float32 and 16-bit rows, from class first to class end.  Calls visit.octet<sizes>(student's, teacher's, one,
// other, end), as often in every thread: the octets' classes are one to one + 3 and other to other + 3, of which those from `end`
// on do not exist and hold -inf.  A row that is not there is not read.
//
// Each thread reads two words of each tensor at a time.  They lie `threads` words apart, so that a warp always reads neighbouring
// words: one octet of float32, or two of 16-bit logits.  Where the tensors' words hold different numbers of classes each thread
// reads the neighbouring words of one octet.
template <int kStudentSize, int kTeacherSize, class Visit>
KCD_DEVICE void walk_octets(const Row& student, const Row& teacher, int first, int end, bool aligned, int thread, int threads,
                            const Visit& visit) {
  constexpr bool kApart = kStudentSize == kTeacherSize, kTwo = kApart && kStudentSize == 2;
  constexpr int kClasses = kApart ? kWordBytes / kStudentSize : kOctet;   // a thread's neighbouring ones
  const int distance = kApart ? threads * kClasses : kQuad, step = threads * (kTwo ? 2 * kOctet : kOctet);
  for (; first < end; first += step) {
    int one = first + thread * kClasses;
    Octet z{}, y{};
    if (aligned && end - first >= step) {
      if (student.begin) z = load_aligned_octet<kStudentSize, kApart>(student, one, one + distance);
      if (teacher.begin) y = load_aligned_octet<kTeacherSize, kApart>(teacher, one, one + distance);
    } else {
      if (student.begin) z = load_octet<kStudentSize, kApart>(student, one, one + distance, end);
      if (teacher.begin) y = load_octet<kTeacherSize, kApart>(teacher, one, one + distance, end);
    }
#pragma unroll 1
    for (int half = 0; half < (kTwo ? 2 : 1); ++half) {
      visit.template octet<kStudentSize, kTeacherSize>(z, y, one, kTwo ? one + kQuad : one + distance, end);
      one += distance;
      z.word[0] = z.word[1];
      y.word[0] = y.word[1];
    }
  }
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
    const bool aligned =
        (!student.begin || offset_of(student.at(first)) == 0) && (!teacher.begin || offset_of(teacher.at(first)) == 0);
    // Around a word that is not aligned more is read: that must lie in the row too.
    const int margin = aligned ? 0 : kOctet, octets = (part.end - first - 2 * margin) / kOctet;
    const int teacher_size = teacher.begin ? teacher.size : leading.size;
    if (octets > 0 && leading.size <= 4 && teacher_size <= 4) {
      first += margin;
      last = first + octets * kOctet;
      if (leading.size == 2 && teacher_size == 2) walk_octets<2, 2>(student, teacher, first, last, aligned, thread, threads, visit);
      if (leading.size == 4 && teacher_size == 4) walk_octets<4, 4>(student, teacher, first, last, aligned, thread, threads, visit);
      if (leading.size == 2 && teacher_size == 4) walk_octets<2, 4>(student, teacher, first, last, aligned, thread, threads, visit);
      if (leading.size == 4 && teacher_size == 2) walk_octets<4, 2>(student, teacher, first, last, aligned, thread, threads, visit);
    }
  }
  walk_quads(part.begin, first, last, part.end, thread, threads, visit);
}

}   // namespace kcd::cuda
