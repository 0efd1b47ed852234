#!/usr/bin/env python3
"""Deliberate faults, each in one place of one source, and the test that must see it.

    python3 test/mutants.py [NAME...] [--jobs N]     plants each fault in a copy of the tree, builds the one program that
                                                     its test needs, runs the one test; a fault that survives is a hole
    python3 test/mutants.py --check                  only looks that each fault's text is where it is said to be

What the tests are worth shows here: a wrong index, sign, constant or order, a wait or a check left out. A fault is a text
that its file has exactly once, and what takes its place. A source that changes takes its faults with it: --check is part of
the suite. What a GPU alone runs (cuda_backend.cuh, NCCL) is not here. Ends with
`N passed, N failed, N skipped`; passed: caught.
"""
import argparse
import concurrent.futures
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("*.h", "*.cuh", "*.cu", "Makefile", "README.md", "LICENSE", "kernels", "scripts", "test", "dev/*.h", "dev/*.cuh", "dev/*.md", "dev/results/*.log")
LONGEST = 300  # seconds of a test: a fault that makes it hang is caught

# test: the program, then which of its tests: a doctest pattern, or a name in test_train.py, test_ranks.py, test_generate.py,
# test_data.py, test_hf.py, test_seam.py
Fault = namedtuple("Fault", "file old new test")
FAULTS = [
    # --- What everyone stands on
    Fault("common.h", "kLayerNormEpsilon = 1e-5f", "kLayerNormEpsilon = 1e-6f", "cpu golden: logits*"),
    Fault("common.h", "kGeluCubic = 0.044715f", "kGeluCubic = 0.044175f", "cpu golden: logits*"),
    Fault("common.h", "return ceil_div(a, b) * b;", "return a / b * b;", "cpu golden: logits*"),
    Fault("common.h", "S_ISREG(info.st_mode)", "true", "host loader: malformed shards*"),

    # --- The CPU backend: the truth for the kernels
    Fault("cpu_backend.h", "p * r + 1.0f / 24;", "p * r + 1.0f / 25;", "cpu exponential agrees*"),
    Fault("cpu_backend.h", "keep = k0 == 0 ? beta : 1.0f;", "keep = beta;", "cpu packed_gemm*"),
    Fault("cpu_backend.h", "std::min(j0 + columns, i + 1) : j0 + columns", "std::min(j0 + columns, i) : j0 + columns", "cpu ns_product*"),
    Fault("cpu_backend.h", "for (int slice = 0; slice < kSlices; slice++) total", "for (int slice = 1; slice < kSlices; slice++) total",
          "cpu layernorm*"),
    Fault("cpu_backend.h", "if (first > 0 && tokens[order[first - 1]] == token) continue;",
          "if (first > 1 && tokens[order[first - 1]] == token) continue;", "cpu embedding"),
    Fault("cpu_backend.h", "- mean_g - y * mean_gy);", "- mean_g);", "cpu layernorm*"),
    Fault("cpu_backend.h", "o[i] += r * (d[i]", "o[i] = r * (d[i]", "cpu layernorm*"),
    Fault("cpu_backend.h", "3.0f * kGeluCubic", "2.0f * kGeluCubic", "cpu gelu*"),
    Fault("cpu_backend.h", "std::fill(row + V, row + Vp, 0.0f);", "", "cpu classifier*"),
    Fault("cpu_backend.h", "row[targets[n]] -= dloss;", "row[targets[n]] -= scale;", "cpu classifier*"),
    Fault("cpu_backend.h", "std::fill(p + visible, p + keys, 0.0f);", "std::fill(p + visible + 1, p + keys, 0.0f);", "cpu attention"),
    Fault("cpu_backend.h", "ds_row[s] = scale * p_row[s] * (ds_row[s] - d);", "ds_row[s] = scale * p_row[s] * ds_row[s];",
          "cpu attention"),
    Fault("cpu_backend.h", "bias_backward(dbias, dqkv, B * T, 3 * C, scratch);", "bias_backward(dbias, dqkv, T, 3 * C, scratch);", "cpu attention"),
    Fault("cpu_backend.h", "v[i] = beta2 * v[i] + (1 - beta2) * g * g;", "v[i] = beta2 * v[i] + (1 - beta1) * g * g;", "cpu adamw*"),
    Fault("cpu_backend.h", "(std::sqrt(v[i] / correction2) + eps)", "std::sqrt(v[i] / correction2 + eps)", "cpu adamw*"),
    Fault("cpu_backend.h", "max_norm / norm : 1.0f;", "max_norm / (norm + 1e-3f) : 1.0f;", "cpu global norm*"),
    Fault("cpu_backend.h", "if (clip[0] == 0) return;\n        ++*t;", "++*t;\n        if (clip[0] == 0) return;", "cpu global norm*"),
    Fault("cpu_backend.h", "(nesterov ? g + mu * buf : buf)", "(nesterov ? g + buf : buf)", "cpu muon_momentum*"),
    Fault("cpu_backend.h", "kLeastNormSquared * positive);", "0.0);", "fiber_bf16 gradient and momentum that cancel"),
    Fault("cpu_backend.h", "if (symmetric) store(D, (size_t(b) * M + j) * N + i, value, type);", "", "cpu ns_product*"),
    Fault("cpu_backend.h", "w = w * decay - step * load(U, (size_t(b) * mp + i) * np + j, type);",
          "w = (w - step * load(U, (size_t(b) * mp + i) * np + j, type)) * decay;", "cpu muon_update*"),
    Fault("cpu_backend.h", "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16", "cpu bf16 and fp16*"),
    Fault("cpu_backend.h", "least = std::min(least, limit - std::min(limit, used));", "least = limit - std::min(limit, used);",
          "cpu memory: limits*"),

    # --- Ownership, Newton-Schulz, the optimizer step
    Fault("dmuon.cuh", "const double s = 1.05;", "const double s = 1.04;", "cpu golden: Muon's*"),
    Fault("dmuon.cuh", "{3.4445, -4.7750, 2.0315}", "{3.4445, -4.7500, 2.0315}", "cpu golden: two Muon*"),
    Fault("dmuon.cuh", "{3.9505, -6.3029, 2.6377}", "{3.9505, -6.3029, 2.6737}", "cpu golden: Muon's*"),
    Fault("dmuon.cuh", "0.2 * std::sqrt(double(std::max(rows, cols)))", "0.2 * std::sqrt(double(std::min(rows, cols)))",
          "cpu golden: two Muon*"),
    Fault("dmuon.cuh", "return you[k];", "return you[0];", "cpu golden: Muon's*"),
    Fault("dmuon.cuh", "? tensor.head_rows : piece.rows;", "? piece.rows : piece.rows;", "cpu golden: Muon's*"),
    Fault("dmuon.cuh", 'options.muon_qkv == "fused" ? 1 : spec.split', 'options.muon_qkv == "heads" ? 1 : spec.split', "cpu golden: Muon's*"),
    Fault("dmuon.cuh", "1.0f - muon_lr * wd, muon_lr", "1.0f - lr * wd, muon_lr", "cpu golden: two Muon*"),
    Fault("dmuon.cuh", "        weights_version++;\n        // Weights that nobody", "        // Weights that nobody", "ranks losses_over_rank_counts"),
    Fault("dmuon.cuh", "plan.trains ? plan.arena : 0", "plan.arena", "train evaluation_alone_needs_no_gradients"),
    Fault("dmuon.cuh", "options.muon_weight_decay >= 0 ?", "options.muon_weight_decay > 0 ?", "train muon_weight_decay"),
    Fault("dmuon.cuh", "adamw(border, end, 0.0);", "adamw(border, end, options.weight_decay);", "cpu golden: ten AdamW steps with*"),
    Fault("dmuon.cuh", "plan.buckets.size() : 1;  // else", "plan.buckets.size() : 0;  // else", "cpu golden: two Muon*"),
    Fault("dmuon.cuh", "symmetric(R, Z, T, T, 1, a, m);", "symmetric(R, Z, T, T, 1, 1, m);", "cpu Newton-Schulz: singular*"),
    Fault("dmuon.cuh", "void need_layer(int l) { need(plan.bucket_of(l)); }", "void need_layer(int) {}", "cpu golden: ten AdamW steps, coll*"),
    Fault("dmuon.cuh", "void need_flat() { need(0); }", "void need_flat() {}", "cpu golden: ten AdamW steps, coll*"),
    Fault("dmuon.cuh", "if (l == plan.buckets[b].layer) start_reduce(b);", "start_reduce(b);", "cpu golden: ten AdamW steps, coll*"),
    Fault("dmuon.cuh", "counted = std::max(piece.owner, 0) == world.rank;", "counted = here;", "comm the same gradients*"),
    Fault("dmuon.cuh", "begin + std::max(piece.owner, 0) * chunk;", "begin + std::max(piece.owner - 1, 0) * chunk;",
          "comm the same gradients*"),
    Fault("dmuon.cuh", "seen[std::minmax({piece.rows, piece.cols})]++ % ranks;", "seen[{piece.rows, piece.cols}]++ % ranks;",
          "ranks plan_is_balanced"),
    Fault("dmuon.cuh", "? down * (down + 1) / 2 : down * across", "? down * across : down * across", "cpu print_plan*"),
    Fault("dmuon.cuh", "bytes / kPlanMemory + blocks * kPlanNormBlock", "bytes / kPlanMemory", "cpu print_plan*"),
    Fault("dmuon.cuh", "return cost[a] > cost[b];", "return cost[a] < cost[b];", "ranks plan_by_lpt"),
    Fault("dmuon.cuh", "end + round_up<size_t>(piece.count, 64)", "end", "comm the same gradients*"),

    # --- The program
    Fault("train_gpt.cu", "return double(step) / double(o.warmup);", "return double(step - 1) / double(o.warmup);", "train schedules"),
    Fault("train_gpt.cu", "const double progress = double(step - o.warmup)", "const double progress = double(step)", "train schedules"),
    Fault("train_gpt.cu", "double(o.steps - step) / std::max(1.0,", "double(o.steps - step + 1) / std::max(1.0,", "train schedules"),
    Fault("train_gpt.cu", "deviation /= std::sqrt(2.0f * float(layers));", "deviation /= std::sqrt(float(layers));", "cpu initial values*"),
    Fault("train_gpt.cu", "mix((uint64_t(tensor) << 40) + element)", "mix(element)", "cpu initial values*"),
    Fault("train_gpt.cu", "grads.layers[L - 1].fcprojb, nullptr, scratch_c", "grads.layers[0].fcprojb, nullptr, scratch_c",
          "cpu golden: loss*"),
    Fault("train_gpt.cu", "Backend::attention_backward(dqkv, dw.qkvb, delta", "Backend::attention_backward(dqkv, dw.fcb, delta", "cpu golden: loss*"),
    Fault("train_gpt.cu", "Backend::zero(vectors, (grads.lnfb + C - vectors) * sizeof(float));",
          "Backend::zero(vectors, (grads.lnfb - vectors) * sizeof(float));", "cpu golden: ten AdamW steps with*"),
    Fault("train_gpt.cu", "== 1 && step <= last_step &&", "== 1 && step < last_step &&", "train the_log_is_cut_late"),
    Fault("train_gpt.cu", "== std::string::npos ? path : before;", "!= std::string::npos ? path : before;", "train the_log_is_cut_late"),
    Fault("train_gpt.cu", "            log.restore();\n", "", "train the_log_is_cut_late"),
    Fault("train_gpt.cu", 'parts += " sources " TEXT_OF_MACRO(SOURCES);', "", "ranks ranks_must_be_given_the_same"),
    Fault("train_gpt.cu", "if (skipped > 0 && !ends)", "if (skipped > 10 && !ends)", "train diverged_run_keeps_what_was_saved_before"),
    Fault("train_gpt.cu", '{"seed", options.seed, meta_number(checkpoint, "seed")}', '{"seed", options.seed, options.seed}',
          "train a_resume_needs_the_same_windows"),
    Fault("train_gpt.cu", "ceil_div<int64_t>(options.eval_tokens, options.seq_len)", "options.eval_tokens / options.seq_len",
          "ranks validation_reads_the_same_on_any_number_of_ranks"),

    # --- Generation
    Fault("cpu_backend.h", "const float weight = p[s] / total;", "const float weight = p[s];", "cpu attention"),
    Fault("generate.h", "weights.wpe + size_t(first) * C", "weights.wpe", "cpu golden: generation*"),
    Fault("generate.h", "attention_last_row(att, cache[l], first + 1", "attention_last_row(att, cache[l], first", "cpu golden: generation*"),
    Fault("generate.h", "std::max(1, config.seq_len / 2)", "std::max(1, config.seq_len / 2 + 1)", "cpu golden: generation*"),
    Fault("generate.h", "logits[a] == logits[b] && a < b", "logits[a] == logits[b] && a > b", "cpu next_token: ties*"),
    Fault("generate.h", "mix(mix(sampling.seed) + uint64_t(i))", "mix(mix(sampling.seed))", "cpu golden: text*"),
    Fault("generate.h", "left >= weights[i]; i++) left -= weights[i]", "left >= weights[i]; i++) left -= total / 9", "cpu next_token: every*"),
    Fault("generate.h", "uint64_t(options.seed + step)", "uint64_t(options.seed)", "generate samples_of_training"),
    Fault("scripts/generate.py", "self.decoder.decode(piece, final)", 'piece.decode(errors="backslashreplace")', "generate odd_bytes"),

    # --- Data
    Fault("dataloader.h", "} while (i >= n);", "} while (i > n);", "host loader: permute*"),
    Fault("dataloader.h", "return (shard.count - 1) / uint64_t(seq_len);", "return shard.count / uint64_t(seq_len);", "host loader: an epoch*"),
    Fault("dataloader.h", "targets[seq_len - 1] = window[seq_len];", "targets[seq_len - 1] = window[seq_len - 1];", "host loader: targets*"),
    Fault("dataloader.h", "epoch_key = mix(mix(seed) + g / windows_);", "epoch_key = mix(mix(seed));", "host loader: an epoch*"),
    Fault("dataloader.h", "if (highest < vocab) return;", "if (highest <= vocab) return;", "host loader: every token*"),
    Fault("dataloader.h", "number + 2 < taken_ + kSlots;", "number + 1 < taken_ + kSlots;", "host loader: targets*"),
    Fault("dataloader.h", "(step_ * uint64_t(accumulation_) + uint64_t(micro_step_)) * ranks + uint64_t(rank_);",
          "(step_ * uint64_t(accumulation_) + uint64_t(micro_step_)) + uint64_t(rank_);", "host loader: ranks and batch*"),
    Fault("dataloader.h", 'if (length == 0) broken(strprintf("has an empty token %d", token));', "", "host tokenizer: malformed*"),
    Fault("common.h", "&& !(point >= 0xd800 && point < 0xe000)", "", "host printable*"),
    Fault("common.h", "for (char c : printable(text)) line +=", "for (char c : text) line +=", "train bad_places"),
    Fault("checkpoint.h", "one_line(error.what()).c_str());", "error.what());", "train bad_places"),
    Fault("train_gpt.cu", "    end_on_unreadable_files();\n", "", "train shard_that_cannot_be_read"),
    Fault("common.h", "- uintptr_t(file->data) < file->bytes) return file;", "- uintptr_t(file->data) > file->bytes) return file;",
          "host a page of a mapped file*"),
    Fault("ranks.h", "sleep(unsigned(turn_to_speak()));", "", "comm mpirun: a file that cannot be read*"),
    Fault("dataloader.h", "if (result == GLOB_ABORTED)", "if (false)", "train bad_shards"),
    Fault("checkpoint.h", "if (header.find(format) == header.npos) not_ours();", "not_ours();", "train bad_checkpoints"),
    Fault("dataloader.h", "if (file.was_cut_short())", "if (false)", "host loader: a shard cut short*"),
    Fault("scripts/data.py", "0, held_out, args.shard_tokens)", "0, count, args.shard_tokens)", "data Data.test_bytes_come_back"),
    Fault("scripts/data.py", "under_way.append(document if i == 0 else None)", "under_way.append(document)", "data Data.test_a_text_of_several_pieces"),
    Fault("scripts/data.py", "return begins[whole] if begin", "return begin if begin", "data Data.test_whole_documents_are_held_out"),
    Fault("scripts/data.py", "if describe(out / name) == properties]", "if describe(out / name)]", "data Data.test_a_damaged_shard_is_made_again"),
    Fault("scripts/compare.py", "part = (value0 - loss) / (value0 - value)", "part = (value - loss) / (value0 - value)",
          "data Compare.test_where_a_run_reaches_a_loss"),

    # --- Evaluation
    Fault("evaluate.h", "totals[0] / (std::log(2.0) * totals[1])", "totals[0] / totals[1]", "host evaluation*"),
    Fault("evaluate.h", "{totals[0] / (double(windows) * T)", "{totals[0] / (double(windows) * batch)", "host evaluation*"),
    Fault("evaluate.h", "tokenizer->text_bytes(targets[i])", "tokenizer->text_bytes(inputs[i])", "host evaluation*"),
    Fault("evaluate.h", "end = windows * (rank + 1) / ranks;", "end = windows / ranks * (rank + 1);", "host evaluation*"),
    Fault("evaluate.h", "token >= vocab)\n", "token > vocab)\n", "host hellaswag: malformed*"),
    Fault("evaluate.h", "if (example.label >= endings)", "if (example.label > endings)", "host hellaswag: malformed*"),
    Fault("evaluate.h", "if (bytes != real_bytes)", "if (bytes < real_bytes)", "host hellaswag: malformed*"),
    Fault("evaluate.h", "loss / ending.count,", "loss,", "host hellaswag: scores*"),
    Fault("evaluate.h", "text[0] != ' ' ? 0 : -1;", "text[0] != ' ' ? 0 : 0;", "host hellaswag: scores*"),
    Fault("evaluate.h", "characters += (c & 0xc0) != 0x80;", "characters += (c & 0x80) == 0;", "host hellaswag: scores*"),
    Fault("evaluate.h", "by[way] < least[way]", "by[way] <= least[way]", "host hellaswag: losses that are equal*"),
    Fault("evaluate.h", "if (std::isfinite(loss) && (choice", "if ((choice", "host hellaswag: losses that are equal*"),
    Fault("evaluate.h", "if (host_sums[n - 1] > 0) return {};", "", "host hellaswag: losses that are equal*"),
    Fault("evaluate.h", "return a.tokens > b.tokens;", "return a.tokens < b.tokens;", "host hellaswag: scores*"),
    Fault("evaluate.h", "cut = std::max(0, row.tokens - (T + 1));", "cut = 0;", "host hellaswag: scores*"),
    Fault("evaluate.h", "std::min(row.tokens - 1, T) - count, count);", "std::min(row.tokens, T) - count, count);", "host hellaswag: scores*"),
    Fault("evaluate.h", "fill(rows[first + b * ranks], T,", "fill(rows[first + b], T,", "host hellaswag: scores*"),

    # --- The timeline, and what a backend must have
    Fault("timeline.h", "span.beside ? 1 : 0", "0", "ranks trace"),
    Fault("timeline.h", "1e3 * Event::ms(begin, end)", "1e3 * Event::ms(origin, end)", "ranks trace"),
    Fault("timeline.h", "static_cast<long long>(first_step) + static_cast<long long>(s)", "static_cast<long long>(first_step)", "ranks trace"),
    Fault("timeline.h", "if (!span.beside && strcmp(span.name, name) == 0)", "if (strcmp(span.name, name) == 0)", "ranks trace"),
    Fault("backend.h", "MethodPointer<type, __VA_ARGS__> name =", "auto name =", "seam small_differences_are_seen"),
    Fault("backend.h", "    OPERATION(all_reduce, Ticket(double* x /*(n)*/, size_t n));\n", "", "seam small_differences_are_seen"),
    Fault("backend.h", "std::is_constructible<typename Backend::NsChain, int /*count*/, NsType, int* /*counters*/>::value", "true",
          "seam small_differences_are_seen"),

    # --- Weights in and out
    Fault("scripts/hf.py", '".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))', '".c_attn.weight", ".c_fc.weight"))',
          "hf Convert.test_matrices_are_transposed"),
    Fault("scripts/hf.py", '(values.astype("<u4") << 16)', '(values.astype("<u4") << 15)', "hf Convert.test_other_ways_to_keep_the_same_weights"),
    Fault("scripts/hf.py", 'if checksum(file.bytes(name)) != file.metadata.get(f"checksum.{name}"):', "if False:",
          "hf Convert.test_bad_files_end_in_one_line"),
    Fault("scripts/hf.py", "if end != self.size:", "if end > self.size:", "hf Convert.test_bad_files_end_in_one_line"),

    # --- Checkpoints
    Fault("checkpoint.h", "if (size < 1 || size > left)", "if (size < 1)", "host checkpoint: a header of any other*"),
    Fault("checkpoint.h", "if (tensor.name <= before) damaged", "if (tensor.name < before) damaged", "host checkpoint: a header of any other*"),
    Fault("checkpoint.h", "if (ckpt::header_text(meta, tensors, sums_) != header)", "if (false)", "host checkpoint: every single bit*"),
    Fault("checkpoint.h", "if (file_.bytes != expected) {", "if (file_.bytes < expected) {", "host checkpoint: cut anywhere*"),
    Fault("checkpoint.h", "        verify(found->second);\n", "", "host checkpoint: a tensor is verified*"),
    Fault("checkpoint.h", "if (held_ == kStripe) take_stripes(stripe_, kStripe), held_ = 0;", "if (held_ == kStripe) held_ = 0;", "host checksum*"),
    Fault("checkpoint.h", "turn(lanes_[2], 12)", "turn(lanes_[2], 13)", "host checksum*"),
    Fault("checkpoint.h", "step > step_ || keep-- <= 0", "keep-- <= 0", "host checkpoint: the newest stay*"),
    Fault("checkpoint.h", "std::sort(found.rbegin(), found.rend());", "std::sort(found.begin(), found.end());", "host checkpoint: auto takes*"),
    Fault("checkpoint.h", "if (!entries && errno == ENOENT) return found;", "if (!entries) return found;", "host checkpoint: auto passes over damage alone*"),
    Fault("checkpoint.h", "if (wrote > 0) done += size_t(wrote);", "if (wrote > 0) done = buffer_.size();", "host checkpoint: no room under*"),
    Fault("checkpoint.h", "if (rename(file_.path.c_str(), path_.c_str()) != 0) give_up(errno);\n        file_.close();",
          "file_.close();\n        if (rename(file_.path.c_str(), path_.c_str()) != 0) give_up(errno);", "host checkpoint: round trip*"),
    Fault("checkpoint.h", "if (data_begin_ % ckpt::kAlignment)", "if (false)", "host checkpoint: a header of any other form*"),
    Fault("checkpoint.h", "if (!same) damaged", "if (false) damaged", "host checkpoint: a tensor is verified*"),

    # --- Ranks
    Fault("comm.h", "offset < length(r) ? std::min(kMessage, length(r) - offset) : 0", "offset < length(r) ? kMessage : 0",
          "comm collectives on 1 to 5*"),
    Fault("comm.h", "for (int peer = 1; peer < world.size; peer++)", "for (int peer = 2; peer < world.size; peer++)",
          "comm collectives on 1 to 5*"),
    Fault("comm.h", 'messages.wait("all_gather");', "", "comm collectives on 1 to 5*"),
    Fault("ranks.h", "{ return std::min(2 * world.rank, 10); }", "{ return 0; }", "comm mpirun: an error of one rank*"),
    Fault("ranks.h", "if (atoi(size) > 1) {", "if (atoi(size) > 0) {", "comm the environment*"),
    Fault("ranks.h", "if (seconds_now() > due + kStoppedFor) return innermost->start_clock();", "", "comm a process that was stopped*"),
    Fault("ranks.h", "tell_all(SIGKILL);  // they would wait for it", "", "comm --gpus: a killed rank*"),
    Fault("ranks.h", "prctl(PR_SET_PDEATHSIG, SIGKILL);", "", "comm --gpus: the ranks end with their parent"),
    Fault("ranks.h", 'gather_host(facts == of_rank_0 ? "" : facts);', 'gather_host("");', "comm ranks that were given*"),
    Fault("ranks.h", "if (received++ > 0) _exit(128 + number);", "", "train asked_twice_it_ends_at_once"),
    Fault("ranks.h", "devices[rank].substr(0, devices[rank].find(' '))", "devices[rank].substr(0, 3)", "comm ranks that share*"),

    # --- Flags
    Fault("flags.h", "check_range(number >= flag.min && number <= flag.max);", "check_range(number >= flag.min);", "host flags: every row refuses*"),
    Fault("flags.h", "if (o.warmup > o.steps) {", "if (o.warmup >= o.steps) {", "host flags: what is no contradiction"),
    Fault("flags.h", 'name == "steps" || ', "", "host flags: what a checkpoint keeps*"),

    # --- Kernels, on fibers
    Fault("kernels/gpt_kernels.cuh", "cp_async_wait<1>();", "cp_async_wait<2>();", "fiber_bf16 layernorm_backward"),
    Fault("kernels/gpt_kernels.cuh", "next_rstd[r] = valid ? rstd[row0 + r] : 0.0f;", "next_rstd[r] = valid ? rstd[row0] : 0.0f;",
          "fiber_fp32 layernorm_backward"),
    Fault("kernels/gpt_kernels.cuh", "if (c + k >= V) x[k]", "if (c + k > V) x[k]", "fiber_fp32 classifier"),
    Fault("kernels/gpt_kernels.cuh", "from_float<real>(softmax(k) - dloss)", "from_float<real>(softmax(k))", "fiber_fp32 classifier"),
    Fault("kernels/gpt_kernels.cuh", "next = load_logits(row, c - stride, V);", "next = load_logits(row, c, V);", "fiber_fp32 classifier"),
    Fault("kernels/gpt_kernels.cuh", "piece += kTokenWarps * kWarpSize)\n", "piece += (kTokenWarps - 1) * kWarpSize)\n", "fiber_bf16 embedding_backward"),
    Fault("kernels/gpt_kernels.cuh", "    __syncthreads();\n    float total = warp_sum(of_warps[lane][warp]);",
          "    float total = warp_sum(of_warps[lane][warp]);", "fiber_fp32 bias_backward"),
    Fault("kernels/gpt_kernels.cuh", "squares[blockIdx.x] = block.counted ? sums[0] : 0.0;", "squares[blockIdx.x] = sums[0];",
          "fiber_fp32 norm_sums*"),
    Fault("kernels/attention.cuh", "l[r] *= correction;", "", "fiber_bf16 attention: large scores"),
    Fault("kernels/attention.cuh", "e % 2 < lane / 4 + e / 2 * 8) s[n][e] = -INFINITY;", "e % 2 <= lane / 4 + e / 2 * 8) s[n][e] = -INFINITY;",
          "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention.cuh", "cp_async_wait<0>();\n        __syncthreads();  // the next tile is there", "__syncthreads();  // the next tile is there",
          "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention.cuh", "if (tile + 1 < tiles) store_terms(tile + 1, next_terms);", "", "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention.cuh", "GptKernels::bias_backward(dbias, dqkv, B * T, 3 * C, scratch);",
          "GptKernels::bias_backward(dbias, dqkv, T, 3 * C, scratch);", "fiber_fp32 attention: heads of 64"),
    Fault("kernels/attention_scalar.cuh", "for (float& x : o[r]) x *= correction;", "", "fiber_fp32 attention: large scores"),
    Fault("kernels/attention_scalar.cuh", "weights[lane * kTwinRows + r] = scale * s[r] * (dp[r] - row_delta);",
          "weights[lane * kTwinRows + r] = s[r] * (dp[r] - row_delta);", "fiber_fp32 attention: heads of 64"),
    Fault("ns_kernels.cuh", "cp_async_wait<kStages - 2>();  // stage k + 1", "cp_async_wait<kStages - 1>();  // stage k + 1", "fiber_bf16 ns_product against sums*"),
    Fault("ns_kernels.cuh", "if (m0 + row == n0 + col) value += diag;", "if (row == col) value += diag;", "fiber_bf16 ns_product against sums*"),
    Fault("ns_kernels.cuh", "if (!move.ref.tall) return;\n    __syncthreads();", "if (!move.ref.tall) return;", "fiber_bf16 gradient and momentum to X*"),
    Fault("ns_kernels.cuh", "w[i][k] * decay - step *", "w[i][k] - step *", "fiber_bf16 muon_update*"),

    # --- Kernels for Hopper, on fibers: descriptors, waits, fences, phases
    Fault("kernels/wgmma.cuh", "descriptor + steps * 2048 / 16", "descriptor + steps * 1024 / 16", "fiber_bf16 wgmma.cuh: products*"),
    Fault("kernels/wgmma.cuh", "descriptor + steps * 32 / 16", "descriptor + steps * 64 / 16", "fiber_bf16 wgmma.cuh: products*"),
    Fault("kernels/wgmma.cuh", "wgmma_descriptor(box, 16, 1024)", "wgmma_descriptor(box, 16, 512)", "fiber_bf16 wgmma.cuh: products*"),
    Fault("kernels/wgmma.cuh", "(((col / 8) ^ (row % 8)) * 8 + col % 8)", "(((col / 8) ^ (row % 4)) * 8 + col % 8)",
          "fiber_bf16 wgmma.cuh: boxes*"),
    Fault("kernels/ns_hopper.cuh", "mbarrier_wait(&shared->full[ring.stage], ring.parity);", "", "fiber_bf16 ns_product against sums*"),
    Fault("kernels/ns_hopper.cuh", "mbarrier_wait(&shared->empty[ring.stage], ring.parity ^ 1);", "", "fiber_bf16 ns_product against sums*"),
    Fault("kernels/ns_hopper.cuh", "mbarrier_wait(&shared->empty[ring.stage], ring.parity ^ 1);",
          "mbarrier_wait(&shared->empty[ring.stage], ring.parity);", "fiber_bf16 ns_product against sums*"),
    Fault("kernels/ns_hopper.cuh", "wgmma_wait<1>();  // the stage", "// the stage", "fiber_bf16 ns_product against sums*"),
    Fault("kernels/ns_hopper.cuh", "    wgmma_wait<0>();\n    wgmma_keep(sums);", "    wgmma_keep(sums);", "fiber_bf16 ns_product against sums*"),
    Fault("kernels/ns_hopper.cuh", "mbarrier_wait(&shared->staging_in, tile_parity);", "", "fiber_bf16 ns_product against sums*"),
    Fault("kernels/ns_hopper.cuh", "mn_major(b, kHopperDepth * kBoxCols * 2)", "mn_major(b, kHopperRows * kBoxCols * 2)",
          "fiber_bf16 ns_product against sums*"),
    Fault("kernels/ns_hopper.cuh", "if (thread == 0) tma_store_wait_read();", "", "fiber_bf16 ns_product against sums*"),
    Fault("kernels/ns_hopper.cuh", "            tma_store_wait();\n", "            tma_store_wait_read();\n", "fiber_bf16 a chain of more*"),
    Fault("kernels/ns_hopper.cuh", "    counter_wait(counter, value);\n", "", "fiber_bf16 a chain of more*"),
    Fault("kernels/ns_hopper.cuh", "chain.products[tile.product - 1].tiles());", "chain.products[tile.product - 1].tiles() / 2);",
          "fiber_bf16 a chain of more*"),
    Fault("kernels/ns_hopper.cuh", "chain.product_count = chain.tiles_per_matrix = 0;", "chain.product_count = 0;", "fiber_bf16 a chain of more*"),
    Fault("kernels/attention_hopper.cuh", "k / 4 * Tiles::box_bytes + k % 4 * 32", "k * 32", "fiber_bf16 attention: heads of 32 and 128"),
    Fault("kernels/attention_hopper.cuh", "mbarrier_wait(&shared.empty[stage], n / Tiles::stages % 2 ^ 1);", "",
          "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention_hopper.cuh", "            wgmma_wait<0>();\n            wgmma_keep(o);\n            my.release_tile();",
          "            my.release_tile();\n            wgmma_wait<0>();\n            wgmma_keep(o);", "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention_hopper.cuh", "mbarrier_arrive_expect(&shared.full[stage], 2 * Tiles::tile_bytes)",
          "mbarrier_arrive_expect(&shared.full[stage], Tiles::tile_bytes)", "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention_hopper.cuh", "        tma_store_fence();\n        barrier_sync", "        barrier_sync", "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention_hopper.cuh", "item.start = own_queries ? item.first + item.own - 1", "item.start = own_queries ? item.first + item.own",
          "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention_hopper.cuh", "- producer_registers) / warpgroups / 8 * 8;", "- producer_registers) / warpgroups / 8 * 8 + 8;",
          "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention_hopper.cuh", "query + 8 * r < T ? lse[head * T + row] * kLog2e : INFINITY;", "lse[head * T + row] * kLog2e;",
          "fiber_bf16 attention: scores far below zero"),
    Fault("kernels/attention_hopper.cuh", "k < kTileRows / 16; k++)", "k < kTileRows / 16 - 1; k++)", "fiber_bf16 attention: heads of 64"),
    Fault("kernels/attention_hopper.cuh", "(size_t(b) * items.tiles + own_tile) * columns", "(size_t(b) * items.tiles + place) * columns",
          "fiber_bf16 attention: heads of 64"),
    Fault("dev/newton_schulz_hopper.cuh", "cp_async_wait<1>();  // step k", "cp_async_wait<2>();  // step k", "fiber_bf16 ladder: X X^T*"),
    Fault("dev/newton_schulz_hopper.cuh", "wgmma_wait<1>();         // step k - 1", "// step k - 1", "fiber_bf16 ladder: X X^T*"),
    Fault("dev/newton_schulz_hopper.cuh", "if (k > 0) release();", "release();", "fiber_bf16 ladder: X X^T*"),
    Fault("dev/newton_schulz_hopper.cuh", "mbarrier_wait(&shared->empty[ring.stage], ring.parity ^ 1);", "", "fiber_bf16 ladder: X X^T*"),
]


class NotHere(Exception):
    """What a test needs this machine has not: MPI, a Python package."""


class Wrong(Exception):
    """The list is not right: a text that is not where it should be, a fault that does not compile."""


def planted(fault):
    text = (ROOT / fault.file).read_text()
    if (found := text.count(fault.old)) != 1:
        raise Wrong(f"{fault.file} has this {found} times, and must have it once: {fault.old!r}")
    if fault.old == fault.new:
        raise Wrong(f"{fault.file}: this changes nothing: {fault.old!r}")
    return text.replace(fault.old, fault.new)


def copy_tree(to):
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            place = to / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, place)
    (to / "build").mkdir()
    if (ROOT / ".venv").is_dir():  # packages that a test needs
        (to / ".venv").symlink_to(ROOT / ".venv")


def build_commands():
    """program -> its compiler's command as make has it, but quick to compile: little optimized, no sanitizers, no warnings."""
    commands = {}
    for variables, targets in ((["NVCC="], ["build/test_host", "build/test_cpu", "build/test_comm", "train_gpt"]),
                               ([], ["build/test_fiber_bf16", "build/test_fiber_fp32"])):
        with tempfile.TemporaryDirectory() as nothing_built:
            said = subprocess.run(["make", "-n", "-B", f"BUILD={nothing_built}", *variables,
                                   *[target.replace("build", nothing_built) for target in targets]],
                                  cwd=ROOT, capture_output=True, text=True).stdout.replace(nothing_built, "build")
        for line in said.splitlines():
            words = shlex.split(line) if " -o " in line else []
            if words and words[words.index("-o") + 1] in targets:
                level = "-O0" if "test_host" in line else "-O1"
                kept = [word for word in words if not re.match("-O.$|-g$|-W|-fsanitize|-fno-sanitize", word)]
                commands[Path(words[words.index("-o") + 1]).name] = [*kept, level, "-w"]
    return commands


def program_of(test):
    kind = test.split(" ", 1)[0]
    return {"train": "train_gpt", "ranks": "train_gpt", "generate": "train_gpt", "hf": "train_gpt", "data": None, "seam": None}.get(kind, "test_" + kind)


def test_command(test):
    kind, which = test.split(" ", 1)
    return {"train": [sys.executable, "test/test_train.py", "./train_gpt", which],
            "ranks": [sys.executable, "test/test_ranks.py", "./train_gpt", "cpu", which],
            "generate": [sys.executable, "test/test_generate.py", "./train_gpt", which],
            "hf": [sys.executable, "test/test_hf.py", "./train_gpt", which],
            "seam": [sys.executable, "test/test_seam.py", which],
            "data": [sys.executable, "-m", "unittest", "-v", "test_data." + which],
            }.get(kind, [f"build/test_{kind}", "-tc=" + which.replace(",", "\\,")])


def run(command, cwd, seconds):
    """(exit code, None: it took too long; what it said). Nothing of it is left."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, cwd=cwd, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True,
                                   env=dict(os.environ, OMP_NUM_THREADS="1"))
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        said.seek(0)
        return code, said.read()[-4000:]


class Mutants:
    def __init__(self, work):
        self.work, self.commands = work, build_commands()
        self.right = {}  # test -> why it cannot be run here, or "" if it passes without a fault
        self.locks = {}
        self.lock = threading.Lock()

    def build(self, tree, program):
        if program:
            code, said = run(self.commands[program], tree, 1200)
            if code != 0:
                raise Wrong(f"does not compile:\n{said[-1500:]}")

    def check_right(self, test):
        """The tree as it is passes the test, and the test is there."""
        program = program_of(test)
        with self.lock:
            lock, built = self.locks.setdefault(test, threading.Lock()), self.locks.setdefault(program, threading.Lock())
        with lock:
            if test in self.right:
                return
            tree = self.work / f"right_{program}"
            with built:
                if not tree.exists():
                    copy_tree(tree)
                    self.build(tree, program)
            code, said = run(test_command(test), tree if not test.startswith("data") else tree / "test", LONGEST)
            ran = re.search(r"test cases: *[1-9]|^[1-9][0-9]* passed|^Ran [1-9]", said, re.M)
            if code == 0 and re.search(r"^0 passed, 0 failed, [1-9]", said, re.M):
                raise NotHere
            if code != 0 or not ran:
                raise Wrong(f"without a fault '{test}' {'does not pass' if ran else 'is no test'}:\n{said[-1500:]}")
            self.right[test] = True

    def caught(self, number, fault):
        """Whether the test fails with the fault in the tree."""
        text = planted(fault)
        self.check_right(fault.test)
        tree = self.work / f"fault_{number}"
        copy_tree(tree)
        (tree / fault.file).write_text(text)
        try:
            self.build(tree, program_of(fault.test))
            return run(test_command(fault.test), tree if not fault.test.startswith("data") else tree / "test", LONGEST)[0] != 0
        finally:
            shutil.rmtree(tree)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only faults whose file, text or test has one of these words")
    parser.add_argument("--check", action="store_true", help="plant nothing, look only that the texts are there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="so many at a time [as many as cores]")
    args = parser.parse_args()
    chosen = [(i, fault) for i, fault in enumerate(FAULTS) if not args.names or any(name in " ".join(fault) for name in args.names)]
    telling = threading.Lock()
    begin, counts = time.time(), {"passed": 0, "failed": 0, "skipped": 0}

    def tell(what, fault, more=""):
        counts[what] += 1
        word = {"passed": "ok", "failed": "FAIL", "skipped": "skip"}[what]
        with telling:
            print(f"{word} {fault.file}: {' '.join(fault.old.split())[:80]} | {fault.test}{more}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants_") as work:
        mutants = None if args.check else Mutants(Path(work))

        def one(number, fault):
            start = time.time()
            try:
                if args.check:
                    planted(fault)
                    counts["passed"] += 1
                elif program_of(fault.test) not in (None, *mutants.commands):
                    tell("skipped", fault, ": its program is not built here")
                elif mutants.caught(number, fault):
                    tell("passed", fault, f" ({time.time() - start:.0f} s)")
                else:
                    tell("failed", fault, ": SURVIVED")
            except NotHere:
                tell("skipped", fault, ": its test is skipped here")
            except Wrong as why:
                tell("failed", fault, f": {why}")

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for done in [pool.submit(one, number, fault) for number, fault in chosen]:
                done.result()
    print(f"{len(chosen)} faults in {time.time() - begin:.0f} s", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return counts["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
