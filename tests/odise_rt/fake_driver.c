/* Stands for libcuda.so.1: whoever asks for a function of the driver gets one that calls a Python function.

   Between the two stands a function in C, because cuda-core calls the driver until the very end of the process, when
   Python is gone. All parameters of the driver's functions are integers and pointers, eight at most. */
#include <stddef.h>
#include <stdint.h>

enum { kDeinitialized = 4, kNotFound = 500, kSlots = 1024 };

typedef intptr_t Word;
typedef int (*Function)(Word, Word, Word, Word, Word, Word, Word, Word);
typedef int (*Lookup)(const char* name); /* number of its slot; negative: there is no such function */

static Lookup lookup;
static Function functions[kSlots];

void odise_look_up_with(Lookup function) { lookup = function; }

void odise_place(int slot, Function function) { functions[slot] = function; }

#define CALL(N)                                                                        \
  static int call_##N(Word a, Word b, Word c, Word d, Word e, Word f, Word g, Word h) { \
    return lookup != NULL ? functions[N](a, b, c, d, e, f, g, h) : kDeinitialized;      \
  }
#define NAME(N) call_##N,
#define EIGHT(DO, N) DO(N##0) DO(N##1) DO(N##2) DO(N##3) DO(N##4) DO(N##5) DO(N##6) DO(N##7)
#define SQUARE(DO, N)                                                                 \
  EIGHT(DO, N##0) EIGHT(DO, N##1) EIGHT(DO, N##2) EIGHT(DO, N##3) EIGHT(DO, N##4) EIGHT(DO, N##5) EIGHT(DO, N##6) \
  EIGHT(DO, N##7)
#define ALL(DO)                                                                                                    \
  SQUARE(DO, 00) SQUARE(DO, 01) SQUARE(DO, 02) SQUARE(DO, 03) SQUARE(DO, 04) SQUARE(DO, 05) SQUARE(DO, 06)         \
  SQUARE(DO, 07) SQUARE(DO, 010) SQUARE(DO, 011) SQUARE(DO, 012) SQUARE(DO, 013) SQUARE(DO, 014) SQUARE(DO, 015) \
  SQUARE(DO, 016) SQUARE(DO, 017) /* octal: 0000 to 01777 */

ALL(CALL)

static const Function calls[kSlots] = {ALL(NAME)};

int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  (void)version, (void)flags;
  const int slot = lookup != NULL ? lookup(name) : -1;
  *function = slot >= 0 ? (void*)calls[slot] : NULL;
  if (status != NULL) *status = slot >= 0 ? 0 : 1;
  return slot >= 0 ? 0 : kNotFound;
}

/* Asked for by its name, without cuda-core. */
int cuDriverGetVersion(int* version) {
  const int slot = lookup != NULL ? lookup("cuDriverGetVersion") : -1;
  return slot >= 0 ? calls[slot]((Word)version, 0, 0, 0, 0, 0, 0, 0) : kDeinitialized;
}
