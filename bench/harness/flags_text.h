// Compatibility flags (SPEC Appendix B) to and from text: "router_mask=zero,norm_rounding=hf".
#pragma once
#include <string>
#include <string_view>

#include "reference/spec/flags.h"

namespace v3b::bench {

// Starts from the defaults; later items win. Throws v3b::Error(usage) at `where` (the option's
// name): unknown flags list all names, bad values list the flag's values, and a flag that no
// forward pass reads (act_scale, balance_f, drop_policy, ppl) cannot be changed.
spec::Flags parse_forward_flags(std::string_view text, const std::string& where = "--flags");
// Every flag that differs from its default, in the form that is parsed; "" when none does.
std::string changed_flags_text(const spec::Flags& f);

}  // namespace v3b::bench
