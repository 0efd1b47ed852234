#!/usr/bin/env python3
"""What must not compile, and what only a sanitizer sees: test_seam.py [NAME...]

The table of backend.h refuses a backend that lacks an operation or has it with other types, and names it; the program
asks for no operation that is not in the table; exponential() is defined for every float.
Needs a C++17 compiler ($CXX, else g++). Prints `ok NAME` or `FAIL NAME: why` and ends with `N passed, N failed, N skipped`.
"""
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CXX = os.environ.get("CXX", "g++")


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


OPERATIONS = re.findall(r"^    OPERATION\((\w+), ", read("backend.h"), re.M)
METHODS = re.findall(r"^    METHOD\(Event, (\w+), ", read("backend.h"), re.M)


class Failed(Exception):
    pass


def expect(condition, why):
    if not condition:
        raise Failed(why)


def execute(command, text):
    return subprocess.run(command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def compiled(text):
    """Exit status and messages of the compiler for a backend that derives from Cpu."""
    done = execute([CXX, "-std=c++17", "-fsyntax-only", "-I" + ROOT, "-x", "c++", "-"],
                   '#include "cpu_backend.h"\n%s\nstatic_assert(is_backend<Other>());\n' % text)
    return done.returncode, done.stdout


def errors_name(messages, names):
    """Every name stands in an error, or in the line of the table that an error quotes."""
    for name in names:
        expect(re.search(r"\b(OPERATION\(%s,|METHOD\(Event, %s,|'%s'|\u2018%s\u2019)" % ((name,) * 4), messages),
               "no error names %s:\n%s" % (name, messages[:3000]))


def test_a_whole_backend_compiles():
    status, messages = compiled("struct Other : Cpu {};")
    expect(status == 0, messages)


def test_each_missing_operation_is_named():
    expect(len(OPERATIONS) > 30, "the table was not understood")
    status, messages = compiled("struct Other { using real = float; struct Event {}; };")
    expect(status != 0, "a backend without operations compiled")
    errors_name(messages, OPERATIONS + METHODS)


def test_each_operation_of_other_types_is_named():
    hidden = "".join("static char %s(char);" % name for name in sorted(set(OPERATIONS)))
    status, messages = compiled("struct Other : Cpu { %s };" % hidden)
    expect(status != 0, "operations of other types compiled")
    errors_name(messages, OPERATIONS)


def test_small_differences_are_seen():
    differences = {
        "gelu_forward": "static void gelu_forward(real*, const real*, int);",  # int for size_t
        "all_reduce": "static Ticket all_reduce(float*, size_t);",  # the overload for double
        "muon_momentum": "static void muon_momentum(void*, const float*, const float*, const MatrixRef*, const float*, int, int, int,"
                         " float, bool, NsType, const float*);",  # const
        "device_name": "static const char* device_name();",
        "done": "struct Event : Cpu::Event { bool done(); };",  # not const
        "ms": "struct Event : Cpu::Event { static double ms(const Event&, const Event&); };",
        "EnqueueDeadline": "struct EnqueueDeadline { EnqueueDeadline(int); };",
        "Range": "struct Range { Range(); };",
        "NsChain": "struct NsChain { NsChain(int); };",
        "Graph": "struct Graph { void run(void (*)()); };",
    }
    for name, text in differences.items():
        status, messages = compiled("struct Other : Cpu { %s };" % text)
        expect(status != 0, name + " of other types compiled")
        expect(re.search(r"\b%s\b" % name, messages), "no error names %s:\n%s" % (name, messages))


def test_the_program_stays_within_the_table():
    used = set(re.findall(r"Backend::(\w+)\(", read("train_gpt.cu") + read("generate.h") + read("dmuon.cuh")))
    expect(len(used) > 30, "the program was not understood")
    outside = used - set(OPERATIONS)
    expect(not outside, "not in backend.h: " + " ".join(sorted(outside)))


def test_exponential_is_defined_for_every_float():
    """Conversions of a NaN or of a large float to an integer are undefined; x86 hides it, a sanitizer does not."""
    with tempfile.TemporaryDirectory() as work:
        flags = ["-std=c++17", "-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-I" + ROOT]
        done = execute([CXX, *flags, "-x", "c++", "-", "-o", work + "/a"], r"""
            #include "cpu_backend.h"
            #include <cstdio>
            int main() {
                for (uint32_t high = 0; high < 65536; high++) {  // every sign and exponent, many mantissas
                    const uint32_t bits = high << 16 | (high * 40503u & 0xffffu);
                    float x;
                    memcpy(&x, &bits, sizeof x);
                    const float y = CpuOps::exponential(x);
                    if (std::isnan(x) ? !std::isnan(y) : !(y > 0 && std::isfinite(y))) return printf("%g -> %g\n", x, y), 1;
                }
            }""")
        if done.returncode and "-lubsan" in done.stdout:
            return "no UBSan here"
        expect(done.returncode == 0, done.stdout)
        run = execute([work + "/a"], "")
        expect(run.returncode == 0, run.stdout)


def main():
    passed = failed = skipped = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_") or sys.argv[1:] and name[5:] not in sys.argv[1:]:
            continue
        try:
            why_not = test()
        except Failed as why:
            print("FAIL %s: %s" % (name[5:], why), flush=True)
            failed += 1
        else:
            print("skip %s: %s" % (name[5:], why_not) if why_not else "ok " + name[5:], flush=True)
            skipped += why_not is not None
            passed += why_not is None
    print("%d passed, %d failed, %d skipped" % (passed, failed, skipped))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
