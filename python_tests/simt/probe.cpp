// Succeeds if a compiler and its sanitizer's runtime work.
#include <cstdio>
#include <thread>

int main() {
  int value = 0;
  std::thread([&] { value = 1; }).join();
  return value - 1;
}
