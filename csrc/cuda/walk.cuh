// How the threads of a row iterate over its classes, in the forward and the backward pass.
#pragma once
#include "cuda/vectors.cuh"

namespace kcd::cuda {

constexpr int kChunk = 8;   // classes; two vectors of float32, or one of a 16-bit type

// The calling thread's index among the `threads` that share a row, a power of two.
KCD_DEVICE int thread_in_row(int threads) { return thread_index() & (threads - 1); }

// The classes [begin, end) of a row that one block processes.  Chunks start at `chunk_begin`, which is aligned in the leading
// tensor: the student's when reading, the gradient's when writing.
struct RowPart {
  int begin, chunk_begin, end;
};

KCD_DEVICE RowPart row_part(const Row& leading, int classes, int part, int parts) {
  const int to_boundary = (kVectorBytes - offset_of(leading.begin)) % kVectorBytes / leading.size;
  const int unaligned = to_boundary < classes ? to_boundary : classes;
  const int share = ((classes - unaligned) / kChunk + parts - 1) / parts * kChunk;
  const int first = unaligned + part * share, end = part == parts - 1 ? classes : first + share;
  return {part == 0 ? 0 : first < classes ? first : classes, first < classes ? first : classes, end < classes ? end : classes};
}

// A thread loads a pair of vectors of each tensor at a time, `threads` vectors apart, so that the loads of a warp are adjacent.
// That is one chunk of float32, or two of a 16-bit type if both tensors have it.  Tensors of different types (except float64)
// are loaded one chunk at a time, in adjacent vectors, and converted to float32.
template <Type kType>
constexpr int kQuadsPerPair = kType == Type::float32 ? 2 : 4;

// The first class of a quad, given the first classes of the two vectors.
template <Type kType>
KCD_DEVICE int first_class_of(int quad, int first_class, int second_class) {
  return kType == Type::float32 ? quad ? second_class : first_class : (quad < 2 ? first_class : second_class) + quad % 2 * kQuad;
}

// Visits the chunks in [first, end).  Calls visit.vectors<type>(student's, teacher's, first_class, second_class, end) equally often
// in every thread.  The vectors start at classes `first_class` and `second_class`; vectors at or past `end` do not exist and
// contain -inf.  `aligned`: all vectors of both rows are aligned.
template <Type kType, class Visit>
KCD_DEVICE void walk_vectors(const Row& student, const Row& teacher, int first, int end, bool aligned, int threads,
                             const Visit& visit) {
  constexpr int kVectorClasses = kVectorBytes / static_cast<int>(size_of(kType));
  const bool same_type = kType != Type::float32 || student.type == teacher.type;
  const int step = threads * kQuadsPerPair<kType> * kQuad;
  for (; first < end; first += step) {
    const int thread = thread_in_row(threads);
    const int first_class = first + thread * (same_type ? kVectorClasses : kChunk),
              second_class = first_class + (same_type ? threads * kVectorClasses : kQuad);
    VectorPair z, y;
    if (aligned && same_type && end - first >= step) {
      z = load_aligned_vectors(student, first_class, second_class);
      y = load_aligned_vectors(teacher, first_class, second_class);
    } else if (same_type) {
      z = load_vectors<kType>(student, first_class, second_class, end);
      y = load_vectors<kType>(teacher, first_class, second_class, end);
    } else {
      z = load_vectors_as_float32(student, first_class, end);
      y = load_vectors_as_float32(teacher, first_class, end);
    }
    visit.template vectors<kType>(z, y, first_class, second_class, end);
  }
}

// Visits the classes [begin, first) and [last, end), four at a time: visit.quad(class, count), equally often in every thread.
// `count` says how many of the four exist.
template <class Visit>
KCD_DEVICE void walk_quads(int begin, int first, int last, int end, int threads, const Visit& visit) {
  const int before = (first - begin + kQuad - 1) / kQuad, quads = before + (end - last + kQuad - 1) / kQuad;
  for (int done = 0; done < quads; done += threads) {
    const int quad = done + thread_in_row(threads);
    const int c = quad < before ? begin + quad * kQuad : last + (quad - before) * kQuad;
    const int left = quad < before ? first - c : end - c;
    visit.quad(c, left < 0 ? 0 : left < kQuad ? left : kQuad);
  }
}

// Visits all classes of a part.  Without a teacher, pass the student's row for both.  The quads come first, so that the loop over
// chunks needs fewer registers.
template <class Real, class Visit>
KCD_DEVICE void walk(const Row& student, const Row& teacher, const RowPart& part, int threads, const Visit& visit) {
  const bool aligned = offset_of(student.at(part.chunk_begin)) == 0 && offset_of(teacher.at(part.chunk_begin)) == 0;
  // An unaligned vector is read as the two aligned ones around it, which must be inside the row too.
  const int margin = aligned ? 0 : kChunk;
  const int chunks = sizeof(Real) == 4 && teacher.type != Type::float64 ? (part.end - part.chunk_begin - 2 * margin) / kChunk : 0;
  const int first = chunks > 0 ? part.chunk_begin + margin : part.end, last = chunks > 0 ? first + chunks * kChunk : part.end;
  walk_quads(part.begin, first, last, part.end, threads, visit);
  if constexpr (sizeof(Real) == 4) {
    if (student.type == Type::bfloat16 && teacher.type == Type::bfloat16)
      walk_vectors<Type::bfloat16>(student, teacher, first, last, aligned, threads, visit);
    else if (student.type == Type::float16 && teacher.type == Type::float16)
      walk_vectors<Type::float16>(student, teacher, first, last, aligned, threads, visit);
    else
      walk_vectors<Type::float32>(student, teacher, first, last, aligned, threads, visit);
  }
}

}   // namespace kcd::cuda
