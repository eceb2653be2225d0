// The table of kernels that runs.
#pragma once

#include <string>
#include <vector>

#include "kernels/contract.hpp"

namespace fastopt {

// The table in use. The first call chooses the best that this CPU runs, or the one that the environment variable
// FASTOPT_ISA names; throws std::invalid_argument if this CPU cannot run it.
const Kernels& kernels();

// Names of the tables that this CPU runs, the best last.
std::vector<std::string> available_isas();

// Switches to a table by name; throws std::invalid_argument with the names that there are.
void use_isa(const std::string& name);

}  // namespace fastopt
