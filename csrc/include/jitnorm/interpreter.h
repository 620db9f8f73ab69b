// Python's global lock, which a call comes with: kept through short calls, since to hand it over costs as much as they
// do, and handed over through long ones. Found by name, so that a library serves every version of Python, or none.
#pragma once
#include <dlfcn.h>

namespace jitnorm {

struct Interpreter {
  int (*held)() = reinterpret_cast<int (*)()>(dlsym(nullptr, "PyGILState_Check"));
  void* (*release)() = reinterpret_cast<void* (*)()>(dlsym(nullptr, "PyEval_SaveThread"));
  void (*acquire)(void*) = reinterpret_cast<void (*)(void*)>(dlsym(nullptr, "PyEval_RestoreThread"));
};

// Other Python threads run while this lives.
class InterpreterReleased {
 public:
  InterpreterReleased() {
    if (python_.held && python_.release && python_.acquire && python_.held()) state_ = python_.release();
  }
  ~InterpreterReleased() {
    if (state_) python_.acquire(state_);
  }
  InterpreterReleased(const InterpreterReleased&) = delete;

 private:
  static inline const Interpreter python_;
  void* state_ = nullptr;
};

}  // namespace jitnorm
