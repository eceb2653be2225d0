#include "dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(FASTOPT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastopt {

extern const Kernels kernels_baseline, kernels_v3, kernels_v4, kernels_neon;
extern const Products products_vnni, products_amx, products_dotprod;

namespace {

struct Candidate {
  const Kernels* table;
  bool runs;
};

Kernels with_products(const char* isa, const Products& products, const Kernels& rest) {
  Kernels table = rest;
  table.isa = isa;
  table.products = products;
  table.products.prepared_bytes = rest.products.prepared_bytes;
  table.products.prepare_x = rest.products.prepare_x;
  table.products.linear_floats = rest.products.linear_floats;
  return table;
}

#if defined(__x86_64__)
// F16C, MOVBE and LZCNT, which x86-64-v3 includes. The oldest compilers that we support do not know them by name in
// __builtin_cpu_supports(), and a hypervisor can hide any of them from a CPU that has AVX2.
bool has_f16c_movbe_lzcnt() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned f16c = 1u << 29, movbe = 1u << 22, lzcnt = 1u << 5;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & f16c) == 0 || (ecx & movbe) == 0) return false;
  return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) != 0 && (ecx & lzcnt) != 0;
}
#endif

#if defined(FASTOPT_AMX)
// AMX, and the permission of Linux to use its registers, which a process asks for once. Linux gives it where the CPU
// has them and threads have room to save them.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & tile) == 0 || (edx & int8) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// In rising order of preference; the first one always runs.
std::vector<Candidate> candidates() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && has_f16c_movbe_lzcnt();
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool vnni = v4 && __builtin_cpu_supports("avx512vnni");
  static const Kernels kernels_vnni = with_products("vnni", products_vnni, kernels_v4);
  std::vector<Candidate> all = {{&kernels_baseline, true}, {&kernels_v3, v3}, {&kernels_v4, v4}, {&kernels_vnni, vnni}};
#if defined(FASTOPT_AMX)
  static const Kernels kernels_amx = with_products("amx", products_amx, kernels_v4);
  static const bool amx = vnni && has_amx();
  all.push_back({&kernels_amx, amx});
#endif
  return all;
#elif defined(__aarch64__)
#if defined(__linux__)
  constexpr unsigned long asimddp = 1ul << 20;  // HWCAP_ASIMDDP
  const bool dotprod = (getauxval(AT_HWCAP) & asimddp) != 0;
#else
  const bool dotprod = true;  // every Apple CPU has it
#endif
  static const Kernels kernels_dotprod = with_products("dotprod", products_dotprod, kernels_neon);
  return {{&kernels_neon, true}, {&kernels_dotprod, dotprod}};
#else
  return {{&kernels_baseline, true}};
#endif
}

const Kernels* best() {
  const Kernels* table = nullptr;
  for (const Candidate& c : candidates()) {
    if (c.runs) table = c.table;
  }
  return table;
}

const Kernels* find(const std::string& name) {
  std::string names;
  for (const Candidate& c : candidates()) {
    if (!c.runs) continue;
    if (name == c.table->isa) return c.table;
    names += names.empty() ? c.table->isa : std::string(", ") + c.table->isa;
  }
  throw std::invalid_argument("isa: expected one of " + names + " (what this CPU runs), got '" + name + "'");
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (!table) {
    const char* forced = std::getenv("FASTOPT_ISA");
    table = forced && *forced ? find(forced) : best();
    current.store(table, std::memory_order_release);
  }
  return *table;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.runs) names.emplace_back(c.table->isa);
  }
  return names;
}

void use_isa(const std::string& name) { current.store(find(name), std::memory_order_release); }

}  // namespace fastopt
