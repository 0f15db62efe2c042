// The way of one row's threads over its classes, the same in both directions.
#pragma once
#include "cuda/words.cuh"

namespace kcd::cuda {

constexpr int kOctet = 8;

// The calling thread's number among the `threads`, a power of two, that share a row.
KCD_DEVICE int thread_of_row(int threads) { return thread_index() & (threads - 1); }

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

// What a thread reads at a time in whole octets: two words of each tensor, which lie `threads` words apart, so that a warp always
// reads neighbouring words.  That is one octet of float32, or two of a 16-bit type that both tensors have.  Of tensors of different
// types, but float64, it is one octet, whose words are neighbours, brought to float32.
template <Type kType>
constexpr int kQuads = kType == Type::float32 ? 2 : 4;

// The class where a quad begins, given where the thread's first and second words begin.
template <Type kType>
KCD_DEVICE int class_of(int quad, int one, int other) {
  return kType == Type::float32 ? quad ? other : one : (quad < 2 ? one : other) + quad % 2 * kQuad;
}

// Whole octets from class first to class end.  Calls visit.octets<type>(student's, teacher's, one, other, end), as often in every
// thread: the words' classes begin at `one` and `other`, words from `end` on do not exist and hold -inf.  `aligned`: every word of
// both rows is.
template <Type kType, class Visit>
KCD_DEVICE void walk_octets(const Row& student, const Row& teacher, int first, int end, bool aligned, int threads,
                            const Visit& visit) {
  constexpr int kClasses = kWordBytes / static_cast<int>(size_of(kType));   // in a word
  const bool same = kType != Type::float32 || student.type == teacher.type;
  const int step = threads * kQuads<kType> * kQuad;
  for (; first < end; first += step) {
    const int thread = thread_of_row(threads);
    const int one = first + thread * (same ? kClasses : kOctet), other = one + (same ? threads * kClasses : kQuad);
    Octet z, y;
    if (aligned && same && end - first >= step) {
      z = load_aligned_octet(student, one, other);
      y = load_aligned_octet(teacher, one, other);
    } else if (same) {
      z = load_octet<kType>(student, one, other, end);
      y = load_octet<kType>(teacher, one, other, end);
    } else {
      z = load_octet_as_float32(student, one, end);
      y = load_octet_as_float32(teacher, one, end);
    }
    visit.template octets<kType>(z, y, one, other, end);
  }
}

// Classes begin to first and last to end, four at a time: visit.quad(class, how many of the four there are), as often in every
// thread.
template <class Visit>
KCD_DEVICE void walk_quads(int begin, int first, int last, int end, int threads, const Visit& visit) {
  const int before = (first - begin + kQuad - 1) / kQuad, quads = before + (end - last + kQuad - 1) / kQuad;
  for (int done = 0; done < quads; done += threads) {
    const int quad = done + thread_of_row(threads);
    const int c = quad < before ? begin + quad * kQuad : last + (quad - before) * kQuad;
    const int left = quad < before ? first - c : end - c;
    visit.quad(c, left < 0 ? 0 : left < kQuad ? left : kQuad);
  }
}

// Without a teacher its place is taken by the student's row.  What is in no octet comes first, so that the way over the octets has
// less to remember.
template <class Real, class Visit>
KCD_DEVICE void walk(const Row& student, const Row& teacher, const Part& part, int threads, const Visit& visit) {
  const bool aligned = offset_of(student.at(part.first)) == 0 && offset_of(teacher.at(part.first)) == 0;
  // Around a word that is not aligned more is read: that must lie in the row too.
  const int margin = aligned ? 0 : kOctet;
  const int octets = sizeof(Real) == 4 && teacher.type != Type::float64 ? (part.end - part.first - 2 * margin) / kOctet : 0;
  const int first = octets > 0 ? part.first + margin : part.end, last = octets > 0 ? first + octets * kOctet : part.end;
  walk_quads(part.begin, first, last, part.end, threads, visit);
  if constexpr (sizeof(Real) == 4) {
    if (student.type == Type::bfloat16 && teacher.type == Type::bfloat16)
      walk_octets<Type::bfloat16>(student, teacher, first, last, aligned, threads, visit);
    else if (student.type == Type::float16 && teacher.type == Type::float16)
      walk_octets<Type::float16>(student, teacher, first, last, aligned, threads, visit);
    else
      walk_octets<Type::float32>(student, teacher, first, last, aligned, threads, visit);
  }
}

}   // namespace kcd::cuda
