#include "reports/table.h"

#include <cmath>
#include <cstdio>

namespace v3b::rep {
namespace {

// Display width: UTF-8 continuation bytes take no column.
size_t width(const std::string& s) {
  size_t n = 0;
  for (unsigned char c : s) n += (c & 0xc0u) != 0x80u;
  return n;
}

std::string escaped(const std::string& s) {
  std::string out;
  for (char c : s) {
    if (c == '|') out += '\\';
    out += c;
  }
  return out;
}

}  // namespace

std::string markdown_table(const std::vector<std::string>& header,
                           const std::vector<std::vector<std::string>>& rows,
                           const std::vector<Align>& alignments) {
  const size_t n = header.size();
  std::vector<size_t> w(n);
  for (size_t i = 0; i < n; ++i) w[i] = std::max<size_t>(3, width(escaped(header[i])));
  for (const auto& row : rows)
    for (size_t i = 0; i < n && i < row.size(); ++i) w[i] = std::max(w[i], width(escaped(row[i])));
  const auto align = [&](size_t i) { return i < alignments.size() ? alignments[i] : Align::left; };
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string out = "|";
    for (size_t i = 0; i < n; ++i) {
      const std::string cell = i < cells.size() ? escaped(cells[i]) : "";
      const std::string pad(w[i] - width(cell), ' ');
      out += align(i) == Align::right ? " " + pad + cell + " |" : " " + cell + pad + " |";
    }
    return out + "\n";
  };
  std::string out = line(header) + "|";
  for (size_t i = 0; i < n; ++i)
    out += align(i) == Align::right ? std::string(w[i] + 1, '-') + ":|"
                                    : std::string(w[i] + 2, '-') + "|";
  out += "\n";
  for (const auto& row : rows) out += line(row);
  return out;
}

std::string short_number(std::optional<double> v, int significant) {
  if (!v || !std::isfinite(*v)) return "";
  const double a = std::fabs(*v);
  char text[64];
  if (a != 0 && (a < 1e-3 || a >= 1e9)) {
    std::snprintf(text, sizeof text, "%.*e", significant - 1, *v);
  } else {
    const int digits = a == 0 ? 0 : significant - 1 - static_cast<int>(std::floor(std::log10(a)));
    std::snprintf(text, sizeof text, "%.*f", digits < 0 ? 0 : digits, *v);
  }
  return text;
}

std::string short_bytes(std::optional<double> bytes) {
  if (!bytes) return "";
  static const char* units[] = {"B", "kB", "MB", "GB", "TB"};
  double v = *bytes;
  int i = 0;
  while (std::fabs(v) >= 1000 && i < 4) v /= 1000, ++i;
  return short_number(v) + " " + units[i];
}

std::string short_time_us(std::optional<double> us) {
  if (!us) return "";
  if (*us < 1000) return short_number(us) + " us";
  if (*us < 1e6) return short_number(*us / 1e3) + " ms";
  return short_number(*us / 1e6) + " s";
}

}  // namespace v3b::rep
