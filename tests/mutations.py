"""Plants known faults, one at a time, and checks that the tests notice each.

    python tests/mutations.py                             every fault, a quarter of an hour on two cores
    python tests/mutations.py --only half-bias kl-sign    these only
    python tests/mutations.py --list

A fault replaces one piece of text by another in a copy of the tree; the tests that it names run there, and
one of them must fail. pytest does not collect this file, since it takes much longer than the suite. Whoever
finds a fault that no test noticed adds it here, with the test that now does.

Exit status 1 if a fault is not noticed, no longer applies, or names a test that does not exist.
"""
import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\])?)(?: - |$)", re.MULTILINE)


class Fault(NamedTuple):
    name: str
    what: str                   # what goes wrong, in a few words
    file: str
    old: str                    # occurs once in the file
    new: str
    tests: tuple[str, ...]      # "train::NAME" is tests/test_train.py::test_NAME, "train" the whole file


def fault(name: str, what: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, what, file, old, new, tuple(
        "tests/test_" + test.replace("::", ".py::test_", 1) + ("" if "::" in test else ".py")
        for test in tests))


FAULTS = [
    # -- model.py, kernels/
    fault("attention-tail", "last documents of a cut bucket lost", "kernels/attention.py",
          "for bucket in (similar[i:i + most] for i in range(0, len(similar), most)):",
          "for bucket in (similar[i:i + most] for i in range(0, len(similar) - most + 1, most)):",
          "kernels::a_bucket_of_documents_that_is_too_large_is_cut_and_none_of_it_is_lost"),
    fault("tiles-bf16", "keys' gradients summed in bf16", "kernels/attention.py",
          "product.float() if start else product", "product",
          "kernels::bf16_gradients_of_keys_are_summed_over_tiles_in_fp32"),
    fault("half-bias", "q, k, v, gate, up biases: half grad", "kernels/layers.py",
          "grad.sum(0) if has_bias else None", "grad.sum(0) / 2 if has_bias else None",
          "model::every_parameters_gradient_equals_transformers"),
    fault("attend-future", "attention sees one token ahead", "kernels/attention.py", ".triu_(1)", ".triu_(2)",
          "kernels::attention_equals_its_definition_and_gradients"),
    fault("padding-grad", "padding's gradient is not zeroed", "kernels/attention.py",
          "grads.index_fill_(0, query_indices.padding, 0)", "pass",
          "kernels::attention_equals_its_definition_and_gradients"),
    fault("rope-pairs", "RoPE turns by the negative angle", "kernels/layers.py",
          "out_a.addcmul_(b, sin, value=-1)", "out_a.addcmul_(b, sin, value=1)",
          "model::packed_logits_equal_transformers_one_by_one"),
    fault("rope-backward", "RoPE's gradient not turned back", "kernels/layers.py",
          "_turned(grad, cos, -sin)", "_turned(grad, cos, sin)",
          "model::every_parameters_gradient_equals_transformers"),
    fault("rope-llama3", "llama3 scaling blends the wrong way", "model.py",
          "(1 - blend) * frequencies / rope[\"factor\"] + blend * frequencies",
          "blend * frequencies / rope[\"factor\"] + (1 - blend) * frequencies",
          "model::packed_logits_equal_transformers_one_by_one"),
    fault("norm-eps", "the norm's epsilon is ignored", "kernels/layers.py", ".add_(eps).rsqrt_()",
          ".rsqrt_()", "model"),
    fault("config-eps", "rms_norm_eps is not read", "runtime/model_config.py",
          "float(get(\"rms_norm_eps\", POSITIVE, 1e-6))", "1e-6", "model"),
    fault("gqa-repeat", "queries take another head's keys", "kernels/attention.py",
          "source = tokens[:, None] * n + torch.arange(n)[:, None]",
          "source = tokens[:, None] * n + torch.arange(n).flip(0 if n == key_heads else ())[:, None]",
          "kernels::attention_equals_its_definition_and_gradients"),
    fault("last-norm", "the last norm is left out", "model.py",
          "return self.model.norm(x[:tokens])", "return x[:tokens]",
          "model::packed_logits_equal_transformers_one_by_one"),
    fault("row-unpadded", "rows reach the layers unpadded", "model.py",
          "ids, positions = padded_rows(ids), padded_rows(positions)\n", "pass\n",
          "model::a_row_reaches_the_layers_padded_and_so_does_its_noise"),
    fault("noise-unpadded", "a padded row has no noise", "model.py",
          "noise = None if noise is None else padded_rows(noise)", "noise = None",
          "model::a_row_reaches_the_layers_padded_and_so_does_its_noise"),
    fault("row-sizes", "rows are as long as their tokens", "kernels/layers.py",
          "return -rows % ROWS if", "return 0 if", "kernels::a_cpus_products_have_few_shapes",
          "train::padding_is_what_the_layers_compute_beside_the_tokens"),
    fault("bucket-lengths", "attention: a bucket for each length", "kernels/attention.py",
          "    return -(-length // step) * step\n", "    return length\n",
          "kernels::a_cpus_products_have_few_shapes"),
    fault("chunk-sizes", "a CPU's chunks depend on the rows", "kernels/head.py",
          "size = max(1, CHUNK_LOGITS // vocabulary)\n",
          "size = -(-rows // max(1, -(-rows * vocabulary // CHUNK_LOGITS)))\n",
          "kernels::a_cpus_chunks_have_the_same_size_however_many_rows_there_are"),
    fault("qk-norm", "Qwen3's key norm is the queries'", "model.py",
          "rotate(self.k_norm(k), cos, sin)", "rotate(self.q_norm(k), cos, sin)",
          "model::packed_logits_equal_transformers_one_by_one"),
    fault("bf16-weights", "parameters are kept in bf16", "model.py", "    model.to_empty(device=device)\n",
          "    model.to_empty(device=device).to(torch.bfloat16)\n",
          "weights::round_trip_is_exact_and_loads_in_transformers"),
    fault("no-recompute", "--recompute does nothing", "model.py",
          "if self.recompute and torch.is_grad_enabled():", "if False:",
          "model::recompute_keeps_little_more_than_each_layers_input"),
    fault("layer-number", "a number that differs between layers", "model.py",
          "attend(q, k, v).flatten(1)", "attend(q, k, v).flatten(1) + 0 * (id(self) % 97)",
          "model::layers_are_compiled_as_one_graph_whatever_the_rows"),
    fault("duck-shapes", "sizes equal once are taken for one", "model.py",
          "use_duck_shape = False", "use_duck_shape = True",
          "model::layers_are_compiled_as_one_graph_whatever_the_rows"),
    fault("static-rows", "every row's length is compiled", "model.py",
          "fullgraph=True, dynamic=True", "fullgraph=True, dynamic=False",
          "model::layers_are_compiled_as_one_graph_whatever_the_rows"),
    fault("rng-state", "recomputation stores random states", "model.py",
          "preserve_rng_state=False", "preserve_rng_state=True",
          "model::recomputation_leaves_the_random_state_alone"),
    fault("gqa-keyword", "enable_gqa where it is not known", "kernels/attention.py",
          '({"enable_gqa": True} if "enable_gqa" in known else {})', '{"enable_gqa": True}',
          "kernels::varlen_attn_is_called_as_each_release_of_pytorch_has_it"),
    fault("gqa-heads", "too few key heads before PyTorch 2.12", "kernels/attention.py",
          'if "enable_gqa" not in VARLEN_KEYWORDS:', "if False:",
          "kernels::varlen_attn_is_called_as_each_release_of_pytorch_has_it"),

    # -- kernels: recipes
    fault("recipe-wrong", "a norm is recomputed without weight", "kernels/layers.py",
          "_with_recipe(out, _normed, x, scale, weight)",
          "_with_recipe(out, _normed, x, scale, torch.ones_like(weight))",
          "kernels::linears_equal_their_definition"),
    fault("recipe-unused", "linears keep a norm's output", "kernels/layers.py",
          "recipe = getattr(x, \"recipe\", None)", "recipe = None",
          "kernels::linears_keep_no_output_of_a_norm_or_swiglu_but_what_has_no_recipe"),
    fault("recipe-stale", "what was changed in place: old recipe", "kernels/layers.py",
          "if recipe is None or recipe.version != x._version:", "if recipe is None:",
          "kernels::linears_equal_their_definition"),
    fault("adapter", "an adapter is computed as plain linear", "kernels/layers.py",
          "type(module) is nn.Linear", "isinstance(module, nn.Linear)",
          "kernels::linears_step_aside_for_what_is_not_a_plain_linear_layer"),

    fault("grad-rounded", "a weight's fp32 gradient is rounded", "kernels/layers.py",
          "if dtype == torch.float32 and multiplies_to_fp32(a):", "if False:",
          "kernels::weights_gradients_are_the_fp32_products_where_a_gpu_returns_them"),
    fault("compiled-rounded", "... only where compiled", "kernels/layers.py",
          "if not multiplies_to_fp32(cast):", "if True:",
          "kernels::weights_gradients_are_the_fp32_products_where_a_gpu_returns_them"),

    fault("narrow-products", "compiled: a product for each module", "kernels/layers.py",
          "        out = _ProductForCompile.apply(cast, torch.cat([module.weight for module in modules]))\n"
          "        outputs = out.split([len(module.weight) for module in modules], -1)\n",
          "        outputs = [_ProductForCompile.apply(cast, module.weight) for module in modules]\n",
          "kernels::weights_gradients_are_the_fp32_products_where_a_gpu_returns_them"),

    # -- loss.py, kernels/head.py
    fault("head-rounded", "the head's products are rounded", "kernels/head.py",
          "if multiplies_to_fp32(a) and adds_in_fp32(a.device):", "if False:",
          "kernels::the_heads_gradient_is_summed_in_fp32_without_rounding_where_a_gpu_adds_so"),
    fault("token-mean", "token: all targets counted below", "loss.py",
          "counts[:, weights != 0].sum()", "counts.sum()", "loss::hand_computed_example"),
    fault("example-mean", "example: all examples counted below", "loss.py",
          "np.count_nonzero(own)", "len(own)", "loss"),
    fault("span-mean", "span: mean over examples, not tokens", "loss.py",
          "np.broadcast_to(counts.sum(0), counts.shape)", "counts * len(counts)",
          "loss::hand_computed_example"),
    fault("chunk-edge", "a row is left out of the last chunk", "kernels/head.py",
          "slice(i, min(i + size, rows))", "slice(i, min(i + size, rows - (i > 0)))",
          "kernels::chunked_loss_equals_plain_loss_with_unequal_weights"),
    fault("chunk-weight", "every chunk has the first's weights", "kernels/head.py",
          "(logits, targets[chunk], coefficients[chunk], out[chunk], compiled)",
          "(logits, targets[chunk], coefficients[:len(targets[chunk])], out[chunk], compiled)",
          "kernels::chunked_loss_equals_plain_loss_with_unequal_weights"),
    fault("head-grad", "head's gradient from the last chunk", "kernels/head.py",
          "rows_of_sums += rows_of_a @ b", "rows_of_sums.copy_(rows_of_a @ b)",
          "kernels::chunked_loss_equals_plain_loss_with_unequal_weights"),
    fault("compiled-grad", "compiled: the target's gradient wrong", "kernels/head.py",
          "torch.where(is_target, probability - 1, probability)", "probability",
          "kernels::chunked_loss_equals_plain_loss_with_unequal_weights"),
    fault("compiled-twice", "torch.compile is tried again and again", "kernels/head.py",
          "                self.works = False\n", "                pass\n",
          "kernels::where_torch_compile_does_not_work_it_is_tried_once_and_the_loss_is_the_same"),
    fault("compile-on-cpu", "the loss is compiled on a CPU, too", "kernels/head.py",
          "    if compiled and on_gpu(logits):\n", "    if compiled:\n",
          "kernels::what_is_done_to_each_logit_is_compiled_on_cuda_only_and_only_where_it_may_be"),
    fault("compile-few", "a chunk of few rows is compiled", "kernels/head.py",
          " or len(args[0]) < LEAST_COMPILED:", ":",
          "kernels::what_is_done_to_each_logit_is_compiled_on_cuda_only_and_only_where_it_may_be"),
    fault("oom-compiler", "out of memory: the compiler is blamed", "kernels/head.py",
          "            except torch.OutOfMemoryError:\n                raise\n", "",
          "kernels::running_out_of_memory_is_not_taken_for_a_compiler_that_does_not_work"),
    fault("odd-chunks", "CUDA's chunks are not whole tiles", "kernels/head.py",
          "-(-rows // max(1, -(-rows // most) * TILE)) * TILE", "-(-rows // max(1, -(-rows // most)))",
          "kernels::chunks_for_cuda_are_whole_tiles_of_thousands_of_rows_within_a_bound"),
    fault("kl-sign", "KL(start || model), not the reverse", "loss.py",
          "(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_q - log_p))",
          "loss::kl_is_zero_at_the_start_positive_later_and_has_the_full_gradient"),
    fault("kl-last-chunk", "KL of the last chunk only", "loss.py",
          "total = total + checkpoint(", "total = hidden.sum() * 0.0 + checkpoint(",
          "loss::kl_is_zero_at_the_start_positive_later_and_has_the_full_gradient"),
    fault("context-weight", "messages of weight 0 count", "config.py",
          "weights = np.zeros(len(KINDS))", "weights = np.ones(len(KINDS))", "loss::presets_and_overrides"),
    fault("swapped-weights", "system and instruction swapped", "config.py",
          "enumerate((template, system, instruction, completion))",
          "enumerate((template, instruction, system, completion))", "loss::presets_and_overrides"),
    fault("noise-scale", "noise by the row's length", "loss.py",
          "alpha / (lengths * width).double()", "alpha / (0 * lengths + len(batch.ids) * width).double()",
          "loss::neftune_noise_depends_on_seed_step_and_example_only_and_scales_with_the_documents_length"),
    fault("noise-place", "noise by the place in the row", "loss.py", "+ batch.positions.int())",
          "+ torch.arange(len(batch.ids), dtype=torch.int32))",
          "loss::neftune_noise_depends_on_seed_step_and_example_only_and_scales_with_the_documents_length"),
    fault("noise-hash", "one half of the hash is left out", "loss.py",
          "((16, 0x7feb352d), (15, 0x846ca68b - 2**32))", "((16, 0x7feb352d),)",
          "loss::the_hash_of_the_noise_is_its_formula_on_unsigned_numbers"),
    fault("noise-columns", "columns are mixed with no hash", "loss.py",
          "_hash((word ^ columns).mul_(other_word | 1))", "(word ^ columns).mul_(other_word | 1)",
          "loss::neftune_noise_is_uniform_and_its_numbers_have_nothing_to_do_with_each_other"),
    fault("step-waits", "the host waits for indices of targets", "train.py",
          "trained, untrained, compiled = batch.trained,",
          "trained, untrained, compiled = batch.coefficients.nonzero()[:, 0],",
          "train::the_host_need_not_know_a_number_of_the_device_to_do_a_step"),
    fault("noise-waits", "the host waits for NEFTune's lengths", "loss.py",
          "scales = alpha / (lengths * width)", "scales = alpha / (batch.documents.bincount() * width)",
          "train::the_host_need_not_know_a_number_of_the_device_to_do_a_step"),
    fault("bounds-move", "documents' bounds move to the device", "data.py",
          "if name not in (\"cu_seqlens\", \"examples\")}\n"
          "        return Batch(**moved, cu_seqlens=self.cu_seqlens,",
          "if name != \"examples\"}\n        return Batch(**moved,",
          "train::the_host_need_not_know_a_number_of_the_device_to_do_a_step"),
    fault("unpinned", "copies to CUDA from pageable memory", "runtime/machine.py",
          "        x = x.pin_memory()\n", "        pass\n",
          "data::a_batch_is_copied_to_a_gpu_from_pinned_memory_but_for_the_documents_bounds"),
    fault("kl-casts", "KL casts the head in each chunk", "loss.py",
          "    reference_head = reference_head.to(compute_dtype(hidden))\n", "",
          "loss::kl_casts_the_starting_models_head_once_for_all_chunks_and_both_passes"),

    # -- chat.py, data.py
    fault("no-shift", "a token is its own target", "data.py",
          "dataset.ids[source + 1].astype(np.int64)", "dataset.ids[source].astype(np.int64)",
          "data::batch_shifts_and_counts_positions_within_each_document"),
    fault("input-kinds", "kinds of the input, not the target", "data.py",
          "kinds = dataset.kinds[source + 1]", "kinds = dataset.kinds[source]",
          "data::batch_shifts_and_counts_positions_within_each_document"),
    fault("positions", "positions go on over documents", "data.py",
          "\"positions\": positions,", "\"positions\": np.arange(len(source)),",
          "data::batch_shifts_and_counts_positions_within_each_document"),
    fault("one-document", "attention over the whole row", "data.py",
          "cu_seqlens.astype(np.int32)", "cu_seqlens[[0, -1]].astype(np.int32)",
          "train::packing_and_micro_batch_size_do_not_change_the_trajectory"),
    fault("first-counted", "the first token counted as target", "data.py",
          "np.bincount(kinds[1:], minlength=len(KINDS))", "np.bincount(kinds, minlength=len(KINDS))",
          "data::dataset_holds_what_tokenizing_one_by_one_gives"),
    fault("cut-too-much", "truncation is off by one", "data.py",
          "ids, kinds = ids[:max_length], kinds[:max_length]",
          "ids, kinds = ids[:max_length - 1], kinds[:max_length - 1]", "data::overlong_policies_are_counted"),
    fault("same-epochs", "every epoch in the same order", "data.py",
          "np.random.default_rng([seed, epoch])", "np.random.default_rng([seed])",
          "data::plan_depends_on_seed_and_epoch"),
    fault("last-step", "an epoch's last, partial step lost", "data.py",
          "for i in range(0, len(order), batch_size)]\n",
          "for i in range(0, len(order) - batch_size + 1, batch_size)]\n",
          "data::plan_has_every_example_once_and_steps_that_packing_does_not_change"),
    fault("pack-loses", "an example that finds no room lost", "data.py",
          "        if not heap:\n            return None\n",
          "        if not heap:\n            heap = full\n            continue\n",
          "data::plan_has_every_example_once_and_steps_that_packing_does_not_change"),
    fault("weight-0", "answers of weight 0 are trained", "chat.py",
          "kind = CONTEXT if message.get(\"weight\") == 0 else ROLES[message[\"role\"]]",
          "kind = ROLES[message[\"role\"]]",
          "templates::weight_zero_makes_context_of_a_message_and_its_end_of_turn"),
    fault("end-of-turn", "the end of a turn is not trained", "chat.py",
          "                end += _end_of_answer(text[end:next_content], template)\n", "",
          "data::the_end_of_turn_is_a_target_and_the_first_answer_token_too"),
    fault("begin-of-turn", "think block before it not trained", "chat.py", "    return start\n",
          "    return content\n",
          "templates::completion_begins_where_the_served_prompt_ends"),
    fault("next-header", "the next message's header is trained", "chat.py",
          "if token and template.ends_turn(token[0]) else 0", "if token else 0",
          "templates::the_next_messages_first_token_does_not_end_an_answer"),
    fault("one-probe", "prompts are tried with one turn only", "chat.py",
          "for before in ([], [{\"role\": \"system\", \"content\": \"s\"}], PROBE):", "for before in ([],):",
          "templates::a_prompt_that_differs_only_after_a_system_message_or_a_second_turn_gives_a_warning"),
    fault("drops-text", "\"input\" beside a prompt is dropped", "records.py",
          "    for field in CONVERSATION_FIELDS:\n", "    for field in ():\n",
          "records::a_bad_record_is_named_with_file_and_line"),
    fault("first-word", "template's space takes first words", "chat.py",
          "if kind != TEMPLATE or not character.isspace()]", "]",
          "templates::template_whitespace_takes_no_token_away_from_content"),
    fault("train-false", "\"train\": false is trained", "records.py",
          "weights = {int(value == TRAINS[field]) for field, value in switches.items()}", "weights = {1}",
          "records::switches_of_other_trainers_are_weights"),
    fault("ignores-field", "\"reasoning\" is dropped in silence", "records.py",
          "    _refuse(fields, f\"message {number}\")\n", "",
          "records::a_messages_field_that_would_change_what_is_trained_is_refused_by_name"),
    fault("test-split", "test_sft on the hub is trained on", "records.py",
          "if not OTHER_SPLIT.search(path)]", "]", "records::a_split_on_the_hub_is_the_files_named_after_it"),
    fault("nested-null", "a table's nulls stay in calls", "records.py",
          "{field: _present(item) for", "{field: item for",
          "records::fields_that_a_table_adds_to_the_objects_of_a_column_are_absent_at_any_depth"),
    fault("two-layouts", "the first of two layouts is read", "records.py",
          "if len(fits) > 1 and not _first_says_all(record, fits):", "if False:",
          "records::a_bad_record_is_named_with_file_and_line"),
    fault("study-null", "a study's records lose nulls", "eval/study.py",
          "message[\"tools\"] = text(message[\"tools\"])", "pass",
          "tools::a_study_keeps_the_order_in_which_tools_name_their_fields_and_their_nulls"),
    fault("no-tools", "templates are not given the tools", "chat.py", "tools=_tools(messages) or None",
          "tools=None", "tools::ids_and_mask_are_those_of_transformers"),
    fault("definitions", "tools' definitions are template text", "chat.py",
          "            mark(position + start, position + end, SYSTEM)\n", "",
          "tools::every_span_of_a_qwen_record"),
    fault("call-left-out", "a call that is left out is not noticed", "chat.py",
          "        _check_nothing_is_left_out(message, i, template, text[start:end])\n", "        pass\n",
          "tools::a_template_by_which_a_call_cannot_be_told_apart_is_refused_by_name"),
    fault("arguments-text", "arguments as JSON text stay text", "records.py",
          "_from_text(given) if isinstance(given, str) else given\n    if not isinstance(arguments",
          "given\n    if not isinstance(arguments",
          "tools::every_layout_of_tools_and_calls_is_one_record"),
    fault("content-special", "</s> in a text becomes EOS", "runtime/tokenizer.py",
          "names = {text: f\"\\ue000{secrets.token_hex(16)}\" for text in self.special}",
          "names = {text: text for text in self.special}",
          "tokenizer::content_never_becomes_a_special_token_and_other_text_has_the_ids_of_transformers"),
    fault("bos-padding", "saved padding hides BOS", "runtime/tokenizer.py",
          "        self.reference.no_padding()\n", "",
          "tokenizer::saved_padding_and_truncation_change_no_ids",
          "tokenizer::bos_is_added_where_transformers_adds_it"),
    fault("beyond-rows", "ids beyond the embedding are taken", "data.py", "if dataset.ids.max() >= rows:",
          "if False:", "tokenizer::a_record_with_a_token_beyond_the_embedding_is_named"),
    *(fault(f"key-{part.split('_')[-1]}", f"cache key without {part}", "data.py", f"\"{part}\": {value},",
            f"\"{part}\": 0,", "data::each_part_changes_the_cache_key_and_another_place_does_not",
            "data::special_tokens_and_the_date_of_a_template_that_prints_it_are_in_the_key")
      for part, value in (("max_length", "max_length"), ("overlong", "overlong"),
                          ("special_tokens", "_hash(json.dumps(marks, sort_keys=True))"),
                          ("date", "template.date if template.uses_date else None"),
                          ("code", "_hash(\"\".join(hash_file(file) for file in CODE))"))),
    fault("damaged-cache", "a damaged token cache is mapped", "data.py",
          "            _move_away(folder, unfinished.with_suffix(\".old.part\"), str(error))\n", "",
          "faults::a_damaged_token_cache_is_made_anew",
          "faults::a_damaged_token_cache_that_cannot_be_replaced_is_never_trained_on"),
    fault("other-examples", "IM trains on what IT leaves out", "data.py", "        if require_completion:\n",
          "        if False:\n", "folder::it_and_im_train_on_the_same_examples_unless_asked_otherwise"),

    # -- train.py
    fault("not-usable", "trains what has no targets", "data.py",
          "micro_batches = [self.usable[examples] for of_rank", "micro_batches = [examples for of_rank",
          "train::examples_with_nothing_to_train_on_change_no_step"),
    fault("other-counts", "counts of other examples", "data.py", "np.concatenate(micro_batches)]",
          "np.concatenate([m for of_rank in self.plan[index] for m in of_rank])]",
          "train::examples_with_nothing_to_train_on_change_no_step"),
    fault("decay-norms", "weight decay on norms too", "train.py",
          "\"weight_decay\": 0.0}]", "\"weight_decay\": config.weight_decay}]",
          "train::every_flag_of_the_objective_and_the_optimizer_means_what_a_plain_loop_does"),
    fault("no-decay", "weight decay on nothing", "train.py",
          "\"weight_decay\": config.weight_decay}", "\"weight_decay\": 0.0}",
          "train::every_flag_of_the_objective_and_the_optimizer_means_what_a_plain_loop_does"),
    fault("betas", "AdamW's betas are swapped", "train.py",
          "betas=(config.beta1, config.beta2)", "betas=(config.beta2, config.beta1)",
          "train::every_flag_of_the_objective_and_the_optimizer_means_what_a_plain_loop_does"),
    fault("adam-eps", "AdamW's epsilon is PyTorch's", "train.py", "eps=config.adam_eps", "eps=1e-8",
          "train::every_flag_of_the_objective_and_the_optimizer_means_what_a_plain_loop_does"),
    fault("same-noise", "the same NEFTune noise every step", "train.py",
          "config.neftune_alpha, config.seed, step)", "config.neftune_alpha, config.seed, 0)",
          "train::every_flag_of_the_objective_and_the_optimizer_means_what_a_plain_loop_does"),
    fault("kl-quiet", "KL's reference without the noise", "train.py",
          "start = reference(batch.ids, batch.positions, batch.cu_seqlens, noise)",
          "start = reference(batch.ids, batch.positions, batch.cu_seqlens)",
          "train::every_flag_of_the_objective_and_the_optimizer_means_what_a_plain_loop_does"),
    fault("grad-finite", "gradient norm not checked", "loss.py",
          "map(math.isfinite, [*numbers.values(), grad_norm])", "map(math.isfinite, numbers.values())",
          "train::what_is_not_finite_stops_the_run_before_the_weights_change"),
    fault("kl-finite", "KL not checked", "loss.py", "map(math.isfinite, [*numbers.values(), grad_norm])",
          "map(math.isfinite, [numbers[\"loss\"], grad_norm])",
          "train::what_is_not_finite_stops_the_run_before_the_weights_change"),
    fault("blame-another", "a non-finite loss: wrong record", "loss.py",
          "dataset.where(batch.examples[document])", "dataset.where(document)",
          "train::the_records_whose_loss_is_not_finite_are_named_with_their_lines"),
    fault("free-seed", "resumes with another seed", "train.py", "if not f.metadata[\"free\"]}",
          "if not f.metadata[\"free\"] and f.name != \"seed\"}",
          "folder::every_flag_that_changes_the_weights_is_refused_on_resume_with_another_value"),
    fault("free-batch-size", "resumes with another batch size", "train.py", "if not f.metadata[\"free\"]}",
          "if not f.metadata[\"free\"] and f.name != \"batch_size\"}",
          "folder::every_flag_that_changes_the_weights_is_refused_on_resume_with_another_value"),
    fault("max-steps-lr", "the schedule ignores --max-steps", "train.py",
          "learning_rate(config, step, total_steps)",
          "learning_rate(config, step, config.epochs * per_epoch)",
          "train::a_runs_learning_rates_are_those_written_here_and_so_is_their_number"),
    fault("max-steps-cap", "--max-steps capped at --epochs", "train.py",
          "return config.max_steps or config.epochs * per_epoch",
          "return min(config.max_steps or 10**9, config.epochs * per_epoch)",
          "train::a_runs_learning_rates_are_those_written_here_and_so_is_their_number"),
    fault("constant", "a constant schedule decays", "train.py", "\"constant\": 1.0", "\"constant\": left",
          "train::a_runs_learning_rates_are_those_written_here_and_so_is_their_number"),
    fault("warmup-floor", "warm-up rounded down", "train.py",
          "math.ceil(config.warmup_ratio * total)", "math.floor(config.warmup_ratio * total)",
          "train::a_runs_learning_rates_are_those_written_here_and_so_is_their_number"),
    fault("clip-0", "--clip-grad-norm 0 clips at 1", "train.py",
          "config.clip_grad_norm or math.inf", "config.clip_grad_norm or 1.0",
          "train::without_clipping_a_large_gradient_moves_the_weights_as_it_is"),
    fault("compile-off", "--compile compiles nothing", "train.py",
          "        model.compile_layers()\n", "        pass\n",
          "train::compile_changes_nothing_and_makes_one_graph_of_a_run"),
    fault("compile-falls", "--compile is ignored where it fails", "train.py",
          "if fault and config.compile:", "if False:",
          "train::layers_are_compiled_by_default_on_cuda_and_from_a_size_and_only_where_it_works"),
    fault("ddp-device", "DDP moves documents' bounds to a GPU", "runtime/distributed.py",
          "(model, gradient_as_bucket_view=True)",
          "(model, device_ids=[device], gradient_as_bucket_view=True)",
          "distributed::ddp_leaves_its_inputs_on_their_devices"),
    fault("peak-of-run", "a step's peak is that of the run", "train.py",
          "            reset_peak(device)\n", "",
          "train::metrics_say_which_attention_ran_and_what_a_gpu_reserved"),
    fault("tokens-fit", "micro-batches larger than a GPU", "train.py",
          "or sum(parts.values()) > free_memory:", "or 0 > free_memory:",
          "train::micro_batches_are_as_large_as_a_gpu_and_a_step_allow_and_the_same_on_every_rank"),
    fault("tokens-step", "micro-batches larger than a step", "train.py",
          "if chosen >= of_a_step or ", "if ",
          "train::micro_batches_are_as_large_as_a_gpu_and_a_step_allow_and_the_same_on_every_rank"),
    fault("estimate-eager", "memory as if layers were not compiled", "eval/estimate.py",
          "    if compiled:\n", "    if False:\n",
          "estimate::a_step_on_a_gpu_takes_the_memory_that_is_estimated"),
    fault("tokens-own", "each rank packs for its own GPU", "train.py",
          "min(from_all(chosen))", "chosen",
          "train::micro_batches_are_as_large_as_a_gpu_and_a_step_allow_and_the_same_on_every_rank"),
    fault("long-eval", "long held-out examples stop a run", "eval/spans.py",
          "capacity = max(micro_batch_tokens, int(dataset.lengths.max()))", "capacity = micro_batch_tokens",
          "train::held_out_examples_may_be_longer_than_a_micro_batch"),
    fault("zero-not-null", "0.0 for spans not looked at", "loss.py",
          "int(of_kind[k]) if known else None", "int(of_kind[k]) if known else 0.0",
          "train::what_was_not_computed_is_null_in_the_metrics"),
    fault("ranks-average", "DDP's averaging is not undone", "train.py", "(loss * world_size()).backward()",
          "loss.backward()", "distributed::neither_ranks_nor_sharding_change_the_trajectory"),
    fault("last-no-sync", "DDP never sums the gradients", "train.py",
          "sync_gradients(model, now=i == len(micro_batches) - 1)", "sync_gradients(model, now=False)",
          "distributed::neither_ranks_nor_sharding_change_the_trajectory"),
    fault("rank-loss", "a rank's own loss is logged", "runtime/distributed.py",
          "            dist.all_reduce(flat)\n", "            pass\n",
          "distributed::neither_ranks_nor_sharding_change_the_trajectory"),
    fault("old-plan", "an epoch keeps the last one's plan", "data.py", "        if epoch != self.epoch:\n",
          "        if False:\n", "train::training_equals_a_plain_loop_in_transformers"),
    fault("resume-plan", "a resumed run begins its epoch anew", "train.py",
          "micro_batches, counts = steps[step]\n            sums",
          "micro_batches, counts = steps[step - first_step]\n            sums",
          "checkpoint::a_run_stopped_at_any_step_and_resumed_ends_bit_for_bit_the_same"),
    fault("held-trained", "what is held out is trained on, too", "train.py",
          "        usable = usable[~held_out[usable]]\n", "",
          "train::what_is_held_out_is_evaluated_and_never_trained_on"),
    fault("held-divided", "an instruction on both sides", "data.py",
          "names, members, sizes = np.unique(groups,",
          "names, members, sizes = np.unique(np.arange(len(groups), dtype=np.uint64),",
          "data::records_with_one_instruction_are_never_on_both_sides",
          "study::records_with_one_instruction_are_never_on_both_sides_of_a_study"),
    fault("mix-again", "every epoch has a file's first examples", "data.py",
          "divmod(epoch * count, len(members))", "divmod(0, len(members))",
          "data::a_mix_has_its_shares_in_every_epoch_and_uses_a_files_examples_equally_often"),
    fault("dtype-moves", "auto: another dtype on resume", "train.py",
          "from_main(saved(config, \"dtype\") or resolve", "from_main(resolve",
          "folder::auto_is_the_same_dtype_where_a_run_goes_on_with_another_cpu"),
    fault("dtype-emulated", "bf16 on GPUs that emulate it", "runtime/machine.py",
          "is_bf16_supported(including_emulation=False)", "is_bf16_supported()",
          "machine::auto_is_bf16_where_the_device_has_instructions_for_it"),
    fault("dtype-silent", "nobody warns of emulated bf16", "eval/common.py",
          "    warn_of_emulation(args.dtype, device)\n", "", "look::bf16_that_is_emulated_is_warned_of"),
    fault("compile-unset", "switched off, it counts as compiled", "runtime/machine.py",
          "\"\" if compiled.all() else", "\"\" if True else",
          "machine::why_torch_compile_fails_is_told_in_a_line"),
    fault("closed-stream", "closed standard output stops a run", "runtime/start.py",
          "if getattr(sys, name) is None:", "if False:",
          "start::streams_that_are_closed_get_no_file_and_stop_nothing"),
    fault("orphan-stage", "a stage outlives bench.gpu", "bench/gpu.py", "        end_with_parent()\n", "",
          "bench::a_run_that_is_ended_from_outside_has_written_what_was_found"),
    fault("orphan-child", "what is measured outlives its bench", "runtime/start.py",
          "    raise_interrupts()\n    raise_stops()\n", "    raise_interrupts()\n",
          "bench::a_child_ends_with_the_program_that_is_stopped"),
    fault("orphan-worker", "a killed study's workers train on", "eval/study_runs.py",
          "    threading.Thread(target=watch, daemon=True).start()\n", "",
          "study::workers_end_with_a_study_that_is_killed"),
    fault("counts-twice", "a line given twice is two seeds", "eval/study_statistics.py",
          "        if count > 1:\n", "        if False:\n",
          "study::a_run_counts_once_and_percentages_end_at_100"),
    fault("kept-deleted", "weights that were to be kept are deleted", "eval/study.py",
          "if run.contender and not plan.keep_weights:", "if run.contender:",
          "study::until_a_run_has_begun_nothing_is_bound_and_weights_that_were_kept_stay"),
    fault("mix-free", "resumes with other shares", "train.py", "identity[\"mix\"] = parse_mix(config.mix)[1]",
          "identity[\"mix\"] = []",
          "folder::every_flag_that_changes_the_weights_is_refused_on_resume_with_another_value"),
    fault("keeps-handlers", "a run leaves its signal handlers", "runtime/report.py",
          "        for number, handler in self.earlier.items():\n            signal.signal(number, handler)",
          "        pass", "train::the_signal_handlers_come_back_however_a_run_ends"),
    fault("eval-rank", "all ranks evaluate the same share", "eval/spans.py",
          "model, dataset, capacity, device, rank(), world_size(), rows, compiled)",
          "model, dataset, capacity, device, 0, world_size(), rows, compiled)",
          "distributed::neither_ranks_nor_sharding_change_the_trajectory"),

    # -- runtime/
    fault("lost-state", "optimizer's tensors are not loaded", "runtime/checkpoint.py",
          "        fill(value, stored, everywhere)\n", "        value.zero_()\n",
          "checkpoint::a_run_stopped_at_any_step_and_resumed_ends_bit_for_bit_the_same"),
    fault("step-count", "AdamW's steps count from 0 again", "runtime/checkpoint.py",
          "number = torch.tensor(number, dtype", "number = torch.tensor(0.0 * number, dtype",
          "checkpoint::a_run_stopped_at_any_step_and_resumed_ends_bit_for_bit_the_same"),
    fault("other-optimizer", "another optimizer's state is loaded", "runtime/checkpoint.py",
          "if state[\"optimizer\"] != type(optimizer).__qualname__:", "if False:",
          "checkpoint::another_optimizer_than_the_one_that_wrote_a_checkpoint_is_refused_by_name"),
    fault("keeps-any", "what cannot be stored is left out", "runtime/checkpoint.py",
          "elif value is not None:", "elif False:",
          "checkpoint::an_optimizer_that_keeps_what_cannot_be_stored_is_refused_after_its_first_step"),
    fault("group-rate", "every group has the same lr", "train.py", "group[\"lr\"] = lr * factor",
          "group[\"lr\"] = lr",
          "checkpoint::a_groups_own_rate_keeps_its_ratio_through_the_schedule_and_after_a_resume"),
    fault("left-out-grads", "gradients without optimizer add up", "train.py",
          "raw_model.zero_grad(set_to_none", "optimizer.zero_grad(set_to_none",
          "checkpoint::what_any_optimizer_keeps_is_saved_and_resumed_bit_for_bit"),
    fault("steps-rank", "every rank takes the first's rows", "data.py",
          "own = slice(self.rank * per_rank, (self.rank + 1) * per_rank)", "own = slice(0, per_rank)",
          "data::a_step_is_the_same_examples_with_the_same_coefficients_on_any_ranks_and_in_any_order"),
    fault("takes-damaged", "a damaged checkpoint is taken", "runtime/checkpoint.py", "        if not same:\n",
          "        if False:\n", "checkpoint::a_damaged_checkpoint_is_named_and_the_one_before_it_is_used"),
    fault("save-dtype", "--save-dtype is ignored", "train.py",
          "None if config.save_dtype == \"source\" else DTYPES[config.save_dtype]", "None",
          "train::final_folder_generates_the_same_in_transformers_and_trains_again"),
    fault("print-config", "fingerprint without config.json", "runtime/weights.py",
          "hashlib.sha256((Path(folder) / \"config.json\").read_bytes())", "hashlib.sha256()",
          "weights::a_models_fingerprint_follows_its_config_and_its_weights"),
    fault("added-tokens", "final/ without added_tokens.json", "runtime/tokenizer.py",
          "    write(\"added_tokens.json\", {token[\"content\"]: token[\"id\"] for token in "
          "tokenizer.added_tokens})\n", "", "tokenizer::the_exported_files_agree_on_special_tokens"),
    fault("other-class", "final/ names the source's class", "runtime/tokenizer.py",
          "{\"tokenizer_class\": \"PreTrainedTokenizerFast\", **config",
          "{\"tokenizer_class\": found.get(\"tokenizer_class\"), **config",
          "tokenizer::the_exported_folder_is_tokenized_as_it_was_trained"),
    fault("wrong-bos", "wrong bos_token_id in final/", "runtime/tokenizer.py",
          "generation[\"bos_token_id\"] = ids[\"bos_token\"]", "generation[\"bos_token_id\"] = end",
          "tokenizer::generation_begins_and_ends_with_the_trained_tokens"),
    fault("keep-lines", "a resumed run's log has gaps", "runtime/folder.py",
          "if line[\"step\"] <= last_step))", "if line[\"step\"] < last_step))",
          "checkpoint::a_run_stopped_at_any_step_and_resumed_ends_bit_for_bit_the_same"),
    fault("opens-strange", "other runs' folders are resumed", "runtime/folder.py",
          "check_identity(out, old, identity, settings, f\"--output-dir {out}\", fix, LENGTH)",
          "check_identity(out, {**old, **identity}, identity, settings, \"\", fix, LENGTH)",
          "folder::a_named_checkpoint_does_not_open_the_folder_of_another_run"),
    fault("takes-strange", "another run's checkpoint is used", "runtime/folder.py",
          "check_identity(out, state[\"identity\"], identity, settings, str(start),",
          "check_identity(out, identity, identity, settings, str(start),",
          "folder::every_checkpoint_is_compared_before_it_is_used"),
    fault("late-lock", "what is found before the lock counts", "runtime/folder.py",
          "if (check_folder(out, identity, settings, model_folder), find_checkpoints(out)) "
          "!= (action, saved):", "if False:",
          "folder::what_another_process_trains_until_the_folder_is_locked_is_not_deleted"),
    fault("never-advances", "--resume F starts at F each time", "runtime/folder.py",
          "if named and own and own[-1].resolve() != named.resolve():", "if False:",
          "folder::the_same_command_with_a_named_checkpoint_advances"),
    fault("false-restart", "a new launch is taken for a restart", "runtime/folder.py",
          "old == old | identity | {\"launch\": launch()}", "old.get(\"launch\") == launch()",
          "folder::another_launch_with_the_same_names_is_no_restart"),
    fault("same-launch", "launches are told by process number", "runtime/folder.py",
          "started = Path(f\"/proc/{parent}/stat\").read_text().rpartition(\")\")[2].split()[19]",
          "started = \"\"", "folder::another_launch_with_the_same_names_is_no_restart"),
    fault("owns-nothing", "a run that never began owns a folder", "runtime/folder.py",
          "    if not has_results:\n", "    if not old:\n",
          "folder::a_folder_in_which_nothing_was_trained_belongs_to_nobody"),
    fault("eval-twice", "a cut off evaluation counts", "train.py",
          "keep_lines(out / \"eval.jsonl\", first_step - 1, is_evaluation)", "pass",
          "folder::what_fails_after_the_last_step_loses_no_training",
          "folder::an_evaluation_that_was_cut_off_is_made_again_on_resume"),
    fault("other-rates", "a linear run can be extended", "train.py",
          "if any(learning_rate(config, i, total) != learning_rate(other, i, other_total)", "if any(False",
          "folder::a_run_is_extended_where_its_learning_rates_stay_the_same"),
    fault("loses-end", "the last step is not saved", "train.py", "if stopping or step == total_steps or (",
          "if stopping or (", "folder::what_fails_after_the_last_step_loses_no_training"),
    fault("late-check", "folders are checked after the data", "train.py",
          "        check_folder(out, identity, settings, source.folder)\n", "        pass\n",
          "folder::what_is_cheap_to_check_is_checked_before_the_data_is_tokenized"),
    fault("no-before", "a resumed run has no NLL before", "train.py",
          "        bool(eval_sets) and not start.evaluated)", "        False)",
          "folder::the_table_at_the_end_compares_the_same_records_only"),
    fault("same-name", "records of the same name compared", "runtime/report.py",
          "by_content = {before[\"contents\"][name]: kinds for name, kinds in before[\"data\"].items()}",
          "by_content = {after[\"contents\"].get(name): kinds for name, kinds in before[\"data\"].items()}",
          "folder::the_table_at_the_end_compares_the_same_records_only"),
    fault("needs-begin", "a begun run needs --resume's folder", "runtime/folder.py",
          "and (overwrite or not _begun_from(out, resume)):", ":",
          "folder::a_run_with_its_own_checkpoints_no_longer_needs_the_one_it_began_from"),
    fault("foreign-files", "files of other programs are deleted", "runtime/folder.py",
          "if \"launch\" not in old and present:", "if not old and present - {*RUN_FILES}:",
          "folder::a_folder_without_an_identity_is_never_deleted_or_written_to"),
    fault("like-names", "held-out files share a name", "train.py",
          "return [path if names.count(name) > 1 else name for", "return [name for",
          "folder::held_out_files_of_like_names_each_keep_their_result"),
    fault("quick-delete", "an interrupted quick start is lost", "config.py",
          "if embedded and (Path(config.output_dir) / \"final\").is_dir():", "if embedded:",
          "folder::an_interrupted_quick_start_is_resumed_and_a_finished_one_repeated"),
    fault("model-dot", "--model . is the embedded default", "config.py", "embedded = \"model\" not in given",
          "embedded = not Path(given.get(\"model\", \"\")).name",
          "flags::a_model_whose_path_has_no_name_is_not_taken_for_none"),
    fault("file-deletes", "a config file can delete a run", "runtime/flags.py",
          "if fields[name].metadata[\"in_file\"] and value is not None", "if value is not None",
          "flags::deleting_and_resuming_are_never_read_from_a_file"),
    fault("file-unchecked", "a config file's values: no limits", "runtime/flags.py",
          "return {name: check_flag(fields[name], value) for", "return {name: value for",
          "flags::a_config_file_passes_the_checks_of_the_flags"),
    # -- found without a test
    fault("rope-bf16", "RoPE's positions are rounded to bf16", "model.py",
          "positions[:, None, None].float()", "positions[:, None, None].bfloat16().float()",
          "model::packed_logits_equal_transformers_one_by_one"),
    fault("head-max", "the head's exp overflows", "kernels/head.py",
          "highest, at_target = logits32.amax(1, keepdim=True), logits32.gather(1, target)",
          "highest, at_target = logits32.amax(1, keepdim=True) * 0, logits32.gather(1, target)",
          "kernels::logits_whose_exponential_overflows_have_the_loss_and_gradients_written_here"),
    fault("head-max-gpu", "the compiled head's exp overflows", "kernels/head.py",
          "    highest = logits.amax(1, keepdim=True)\n", "    highest = logits.amax(1, keepdim=True) * 0\n",
          "kernels::logits_whose_exponential_overflows_have_the_loss_and_gradients_written_here"),
    fault("shard-bf16", "sharded gradients are summed in bf16", "runtime/distributed.py",
          "MixedPrecisionPolicy(dtype, torch.float32,", "MixedPrecisionPolicy(dtype,",
          "distributed::a_rank_holds_its_share_and_no_gathered_layer_between_forward_and_backward"),
    fault("plan-sum", "seed and epoch are added", "data.py", "default_rng([seed, epoch])",
          "default_rng(seed + epoch)", "data::plan_depends_on_seed_and_epoch"),
    fault("noise-sum", "seed and step are added", "loss.py", "SeedSequence([seed, step])",
          "SeedSequence(seed + step)",
          "loss::neftune_noise_depends_on_seed_step_and_example_only_and_scales_with_the_documents_length"),
    fault("mix-same", "all files of a mix in one order", "data.py", "[seed, number, file + 1]",
          "[seed, number]",
          "data::a_mix_has_its_shares_in_every_epoch_and_uses_a_files_examples_equally_often"),
    fault("small-weights", "weights below 1 count as none", "data.py", "np.asarray(list(weights)) != 0",
          "np.asarray(list(weights)) >= 1", "data::examples_with_nothing_to_train_on_are_left_out"),
    fault("eval-fp32", "evaluations are in fp32", "train.py",
          "    with autocast(config, model.head_weight.device):\n", "    if True:\n",
          "train::bf16_trains_fp32_parameters_close_to_fp32"),
    fault("free-special", "resumes with other special tokens", "train.py",
          "[parts[\"tokenizer\"], parts[\"special_tokens\"]]", "[parts[\"tokenizer\"]]",
          "folder::a_mismatch_names_the_flag_or_the_file"),
    fault("rows-late", "the template's tokens need no rows", "train.py",
          "    check_vocabulary(model_config.vocab_size, tokenizer, template)\n", "",
          "tokenizer::a_token_beyond_the_embedding_that_is_never_used_is_accepted"),
    fault("mix-cap", "a mix draws more than there is", "train.py",
          "min(config.max_examples or len(usable), len(usable))", "config.max_examples or len(usable)",
          "train::a_folder_in_a_mix_is_said_with_the_examples_of_all_its_files"),
    fault("known-all", "warns of what is not trained", "train.py", "train_set.groups[usable]",
          "train_set.groups", "train::examples_that_ask_what_a_training_example_asks_are_counted"),
    fault("head-compiles", "--no-compile compiles the head", "train.py",
          "untrained, config.compile is not False", "untrained, True",
          "train::compile_changes_nothing_and_makes_one_graph_of_a_run"),
    fault("save-resumed", "--save-every counts from a resume", "train.py", "step % config.save_every == 0",
          "(step - first_step) % config.save_every == 0",
          "checkpoint::a_run_stopped_at_any_step_and_resumed_ends_bit_for_bit_the_same"),
    fault("one-shorter", "a run is resumed as one step shorter", "train.py", "    if steps > total:\n",
          "    if steps > total + 1:\n",
          "folder::a_run_is_extended_where_its_learning_rates_stay_the_same"),
    fault("last-signal", "a signal in the last step: no export", "train.py",
          "totals.pop(\"stop\") > 0 and step + 1 < total_steps", "totals.pop(\"stop\") > 0",
          "folder::a_signal_before_the_last_step_ends_a_whole_run"),
    fault("answer-early", "an answer begins in the one before", "chat.py",
          "    if not first <= start <= end or any(token.end()", "    if not start <= end or any(token.end()",
          "templates::no_answer_begins_before_the_end_of_the_one_before_it"),
    # -- what people bring, and the first seconds
    fault("habit-value", "an answer without the value", "runtime/habits.py",
          "\"\" if value is None else f\" {shorten(value, 100)}\")", "\"\")",
          "habits::a_flag_of_another_trainer_is_answered_with_the_one_that_does_it_here"),
    fault("habit-false", "--bf16 False is taken for true", "runtime/habits.py",
          "sentence[(value or \"\").lower() in (\"false\", \"no\", \"0\", \"none\", \"full\")]",
          "sentence[0]",
          "habits::a_flag_of_another_trainer_is_answered_with_the_one_that_does_it_here"),
    fault("habit-late", "a missing flag hides a wrong one", "runtime/flags.py",
          "        answers = []\n", "        answers = []\n        super().parse_known_args(argv)\n",
          "habits::all_wrong_flags_are_answered_at_once_before_a_missing_one"),
    fault("habit-other", "names a flag of another program", "runtime/habits.py",
          "if named and named[0] not in flags:", "if False:",
          "habits::all_wrong_flags_are_answered_at_once_before_a_missing_one"),
    fault("habit-limit", "offers a value that is refused", "runtime/habits.py",
          "(must := limit(named[0], value))", "(must := \"\")",
          "habits::whatever_an_answer_offers_the_next_call_accepts",
          "habits::a_value_that_the_flag_here_may_not_have_is_not_offered"),
    fault("error-width", "errors beyond 80 columns", "runtime/start.py", "textwrap.TextWrapper(WIDTH",
          "textwrap.TextWrapper(99",
          "start::on_a_terminal_an_error_breaks_between_words_and_elsewhere_it_is_one_line"),
    fault("habit-file", "names in a config are not answered", "runtime/flags.py",
          "answer(given, text, parser.flags, parser.limit)", "given",
          "habits::the_same_names_in_a_config_file_are_answered_alike"),
    fault("config-dates", "a date of TOML is no text", "runtime/flags.py",
          "value.isoformat() if isinstance(value, datetime.date) else value", "value",
          "flags::toml_and_yaml_say_what_json_says"),
    fault("config-twice", "YAML's last one of two counts", "runtime/flags.py",
          "if name in saved:", "if name in saved and file.endswith(\".json\"):",
          "flags::a_config_that_cannot_be_read_is_one_line"),
    fault("config-nested", "a nested config: traceback", "runtime/flags.py",
          "except (OSError, ValueError, RecursionError) as error:", "except (OSError, ValueError) as error:",
          "flags::a_config_that_cannot_be_read_is_one_line"),
    fault("no-pyyaml", "YAML without PyYAML: traceback", "runtime/flags.py", "except ImportError:",
          "except KeyError:", "flags::yaml_without_pyyaml_says_what_else_will_do"),
    fault("early-train", "train.py's flags wait for PyTorch", "train.py",
          "# PyTorch takes seconds to import.", "import torch  # noqa\n#",
          "program::help_and_a_wrong_flag_are_answered_before_pytorch_is_imported"),
    fault("early-spans", "eval.spans' flags wait for PyTorch", "eval/spans.py",
          "answer_command(__name__, parse_args)\n", "", "program::help_and_a_wrong_flag_are_answered_before"
          "_pytorch_is_imported"),
    fault("early-files", "missing files wait for PyTorch", "train.py", "check_inputs(parse_args(argv))",
          "parse_args(argv)", "start::help_and_errors_of_values_files_and_models_come_before_pytorch"),
    fault("early-lines", "contenders wait for PyTorch", "eval/study.py", "        parse_contenders(args)\n",
          "", "program::what_cannot_be_used_is_named_before_pytorch_is_imported"),
    fault("early-study", "... and the study's files", "eval/study.py", "        check(args, parse_lrs(args))",
          "        parse_lrs(args)", "program::what_cannot_be_used_is_named_before_pytorch_is_imported"),
    fault("ctrl-c-early", "Ctrl-C while importing: traceback", "train.py", "    answer_interrupts()\n",
          "    pass\n", "start::ctrl_c_during_imports_is_one_line"),
    fault("ctrl-c-eval", "... of a command of eval", "eval/__init__.py", "\nanswer_interrupts_of_modules()",
          "", "start::ctrl_c_during_imports_is_one_line", "program::ctrl_c_is_one_line"),
    fault("ctrl-c-bench", "Ctrl-C in a benchmark: traceback", "runtime/start.py",
          "    except KeyboardInterrupt:", "    except ZeroDivisionError:", "program::the_end_of_a_program",
          "program::ctrl_c_is_one_line"),
    fault("ctrl-c-ranks", "every rank says it", "runtime/start.py", "    if is_main():\n        os.write",
          "    if True:\n        os.write", "start::ctrl_c_during_imports_is_one_line"),
    fault("ctrl-c-nohup", "a background run ends at Ctrl-C", "runtime/start.py",
          "if signal.getsignal(signal.SIGINT) is signal.default_int_handler:", "if True:",
          "start::who_ignores_ctrl_c_goes_on_ignoring_it_and_cleaning_up_needs_the_exception"),
    fault("root-cause", "torchrun does not know the error", "runtime/start.py",
          "if file := os.environ.get(\"TORCHELASTIC_ERROR_FILE\"):", "if file := None:",
          "start::torchrun_ends_with_the_error_of_the_rank"),
    fault("as-a-file", "python eval/NAME.py: traceback", "eval/eval.py", "sys.exit(f\"error: start it",
          "print(f\"error: start it", "start::a_command_that_is_started_as_a_file_says_how_it_is_started"),
    fault("adapter-base", "an adapter's tokenizer is its own", "runtime/model_folder.py",
          "if not (folder / \"tokenizer_config.json\").is_file():", "if False:",
          "model_folder::an_adapter_is_to_be_merged_with_the_tokenizer_of_its_base"),
    fault("run-folder", "a run does not name its model", "runtime/model_folder.py", "(\"final\", \"*\",",
          "(\"*.gone\",", "model_folder::a_run_is_not_its_model_but_names_it"),
    fault("old-tokenizer", "a tokenizer to convert is missing", "runtime/model_folder.py",
          "has(\"tokenizer.model\", \"vocab.json\", \"tokenizer_config.json\")", "has(\"tokenizer.model\")",
          "model_folder::a_folder_without_tokenizer_json_gets_one_by_the_command_in_the_error"),
    fault("old-weights", "weights are converted elsewhere", "runtime/model_folder.py",
          "own_name = name.rstrip(\"/\") if Path(name).is_dir() else name.rpartition(\"/\")[2]",
          "own_name = name.rpartition(\"/\")[2]",
          "model_folder::a_folder_with_pytorch_model_bin_is_converted_by_the_command_in_the_error"),
    fault("track-twice", "TensorBoard has killed steps twice", "runtime/track.py",
          "purge_step=step)", "purge_step=None)",
          "track::an_interrupted_and_resumed_runs_event_files_hold_each_line_once"),
    fault("track-eval", "evaluations again are there twice", "runtime/track.py",
          "first_step + (not evaluates_first)", "first_step + 1",
          "track::an_interrupted_and_resumed_runs_event_files_hold_each_line_once"),
    fault("track-before", "--overwrite leaves the old curves", "runtime/folder.py",
          "\"tensorboard\", \"wandb\", ", "",
          "track::an_interrupted_and_resumed_runs_event_files_hold_each_line_once"),
    fault("track-id", "a resumed run is another in wandb", "runtime/track.py",
          "id=before[-1].name.rpartition(\"-\")[2] if before else None", "id=None",
          "track::wandb_offline_gets_the_lines_and_a_resumed_run_keeps_its_id"),
    fault("among-foreign", "--overwrite writes among files", "runtime/folder.py",
          "    _check_ownership(out, old)\n", "    if not overwrite:\n        _check_ownership(out, old)\n",
          "folder::a_folder_without_an_identity_is_never_deleted_or_written_to"),
    fault("true-is-1", "JSON's true is the number 1", "runtime/flags.py",
          "number = kind(re.sub(", "number = kind(value) if value is True else kind(re.sub(",
          "flags::a_config_file_passes_the_checks_of_the_flags"),
    fault("loses-head", "a trained head is dropped as tied", "runtime/model_config.py",
          "if embedding and head and not equal(embedding, head):", "if False:",
          "weights::a_head_that_differs_from_a_tied_embedding_is_kept_as_transformers_keeps_it"),
    fault("one-dtype", "config.json without torch_dtype", "runtime/weights.py",
          "dict.fromkeys((\"dtype\", \"torch_dtype\"),", "dict.fromkeys((\"dtype\",),",
          "weights::config_json_names_the_dtype_of_the_file_for_every_reader_and_keeps_the_rest"),
    fault("nan-weights", "NaN in weights is loaded", "runtime/weights.py",
          "if not torch.stack(piece.aminmax()).isfinite().all():", "if False:",
          "weights::a_tensor_that_is_not_finite_is_named"),
    fault("index-ignored", "the index's choice of a file ignored", "runtime/weights.py",
          "if chosen.get(name, file) != file:", "if False:",
          "weights::of_two_files_with_one_tensor_the_index_chooses"),
    fault("no-fsync", "files are renamed unflushed", "runtime/files.py",
          "    for file in part.iterdir():\n        sync(file)\n", "",
          "files::a_folder_is_on_the_disk_before_it_has_its_name"),
    fault("no-fsync-text", "small files are renamed unflushed", "runtime/files.py",
          "            os.fsync(file.fileno())\n", "",
          "files::nothing_of_a_run_gets_its_name_before_it_is_on_the_disk"),
    fault("piece-rows", "a tensor's first piece read again", "runtime/weights.py",
          "piece = _read(stored, a, b).to(local)", "piece = _read(stored, first, first + b - a).to(local)",
          "distributed::neither_ranks_nor_sharding_change_the_trajectory"),
    fault("shard-norm", "sharded: a rank's own gradient norm", "train.py",
          "norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip_grad_norm or math.inf)",
          "norm = torch.nn.utils.get_total_norm([getattr(p.grad, \"_local_tensor\", p.grad)\n"
          "                                              for p in raw_model.parameters()])\n"
          "            torch.nn.utils.clip_grads_with_norm_(raw_model.parameters(),\n"
          "                                                 config.clip_grad_norm or math.inf, norm)",
          "distributed::neither_ranks_nor_sharding_change_the_trajectory"),

    # -- eval/
    fault("rank-sums", "a rank's own sums for all ranks'", "eval/spans.py", "        dist.all_reduce(sums)\n",
          "", "distributed::neither_ranks_nor_sharding_change_the_trajectory"),
    fault("example-nll", "mean over examples weighs by tokens", "eval/spans.py",
          "float((nats / tokens).mean())", "float(nats.sum() / tokens.sum())",
          "spans::nll_of_every_example_and_both_means_equal_transformers"),
    fault("exact-match", "an answer that begins right counts", "eval/generate.py",
          "answer[\"output\"] == answer[\"expected\"]", "answer[\"output\"].startswith(answer[\"expected\"])",
          "generate::answers_of_a_run_count_as_right_if_they_are_equal_but_for_space_around_them"),
    fault("step-asks", "generation asks for the longest guess", "eval/engine.py",
          "most = longest * group", "most = (int(nth.max()) + 1) * group",
          "generate::the_host_waits_once_a_step_for_the_ids_that_were_chosen"),
    fault("float-sums", "sampling cumulates fp64", "eval/engine.py",
          "return (mass.double() * UNITS).long()", "return (mass.double() * UNITS).floor()",
          "generate::sampling_cumulates_integers_which_cuda_does_in_deterministic_mode_too"),
    fault("row-copies", "the host waits for every row's NLL", "eval/spans.py",
          "values.append(nll(hidden, model.head_weight, batch.targets, compiled))",
          "values.append(nll(hidden, model.head_weight, batch.targets, compiled).cpu())",
          "spans::the_host_waits_for_a_file_once_however_many_rows_it_takes"),
    fault("two-copies", "likelihoods are copied in two parts", "eval/likelihood.py",
          "torch.stack([x.double() for x in score(model, torch.cat(predicting), wanted)]).cpu()",
          "(x.cpu().double() for x in score(model, torch.cat(predicting), wanted))",
          "harness::the_host_waits_once_for_each_row_in_which_requests_end"),
    fault("cache-place", "a step's keys are written too early", "eval/engine.py",
          "place + j, token) for slot", "max(place + j - 1, 0), token) for slot",
          "generate::greedy_equals_transformers_in_slots_that_are_refilled_and_alone"),
    # -- eval/study*.py
    fault("study-narrow", "intervals forget the seeds", "eval/study_statistics.py",
          "square = square + np.maximum(", "square = square + 0 * np.maximum(",
          "study::intervals_hold_the_true_mean_as_often_as_they_say"),
    fault("study-start", "the start may be chosen", "eval/study_statistics.py",
          'if evaluation["step"] > 0:', 'if evaluation["step"] >= 0:',
          "study::selection_takes_the_lowest_mean_over_seeds"),
    fault("study-ratio", "a token mean's tokens do not vary", "eval/study_statistics.py",
          "return ratio + (sums - ratio * tokens) / tokens.mean()", "return sums / tokens.mean()",
          "study::values_of_a_token_mean_have_its_mean_and_its_error"),
    fault("study-deaf", "a signal between runs is lost", "eval/study_runs.py",
          "        for number, handler in before.items():\n            signal.signal(number, handler)",
          "        pass", "study::a_study_that_is_stopped_resumes_exactly",
          "study::the_signal_handlers_come_back"),
    fault("tee", "a Ctrl-C that also ends the reader of the output loses the steps", "runtime/report.py",
          "            silence(sys.stdout)\n", "            raise\n",
          "report::a_run_whose_reader_is_gone_goes_on"),
    fault("stale-results", "results of deleted weights are shown as a new run's", "eval/results.py",
          "            del owners[folder]\n", "            pass\n",
          "compare::results_of_weights_that_a_run_no_longer_has_are_left_out"),
    fault("study-retrain", "a lost line stops a study for good", "eval/study_runs.py",
          "        shutil.rmtree(out)\n", "        pass\n", "study::a_study_that_is_stopped_resumes_exactly"),
    fault("study-worker", "a dead worker is asked again", "eval/study_runs.py",
          "                worker = None\n", "                pass\n",
          "study::a_worker_that_dies_costs_its_run_only"),
    fault("study-seed", "all runs have one seed", "eval/study_runs.py",
          "lr=run.lr, seed=run.seed,", "lr=run.lr,", "study::a_run_of_a_study_equals_a_process_of_its_own",
          "study::the_lines_hold_what_the_runs_evaluated"),
]


class Result(NamedTuple):
    status: str         # noticed, timeout, not noticed or error
    detail: str = ""    # the test that failed, or what is wrong with the fault
    seconds: float = 0.0

    @property
    def fine(self) -> bool:
        return self.status in ("noticed", "timeout")


def copy_tree(folder: Path) -> Path:
    """A copy of the tree without what runs and tools leave there."""
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv", "runs", "docs")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def pytest(tree: Path, arguments: list[str], timeout: float) -> tuple[int | None, str]:
    """The exit status, None if it took longer than timeout seconds, and what was printed."""
    # No bytecode files: they tell changes by time and size, and a fault may change neither.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p",
                                    "no:cacheprovider", *arguments], cwd=tree, env=env, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout)
        except BaseException as error:
            # torchrun ends its ranks on SIGTERM, but leaves them behind on SIGKILL
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(2)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
        out.seek(0)
        return status, out.read()


def try_fault(planted: Fault, known: set[str], timeout: float, all_tests: bool) -> Result:
    text = (ROOT / planted.file).read_text()
    if (count := text.count(planted.old)) != 1:
        return Result("error", f"no longer applies: its text occurs {count} times in {planted.file}")
    if missing := [test for test in planted.tests if test not in known]:
        return Result("error", f"no such test: {missing[0]}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as home:
        tree = copy_tree(Path(home) / "tree")
        (tree / planted.file).write_text(text.replace(planted.old, planted.new))
        status, printed = pytest(tree, list(planted.tests), timeout)
        if status == 0 and all_tests:
            status, printed = pytest(tree, ["tests"], 10 * timeout)
    seconds = time.monotonic() - began
    if status is None:
        return Result("timeout", "", seconds)
    if status == 0:
        return Result("not noticed", "", seconds)
    failed = FAILED.search(printed)
    if status != 1 and not failed:      # 2 to 5: pytest itself could not run them
        return Result("error", printed.strip().splitlines()[-1] if printed.strip() else f"status {status}")
    return Result("noticed", failed[1] if failed else "", seconds)


def known_tests(tests: list[str]) -> set[str]:
    """Every name by which pytest can be given one of the tests in these files."""
    files = sorted({test.split("::")[0] for test in tests if (ROOT / test.split("::")[0]).is_file()})
    status, printed = pytest(ROOT, ["--collect-only", *files], 300)
    if status != 0:
        sys.exit(f"error: pytest cannot collect {' '.join(files)}:\n{printed}")
    nodes = [line for line in printed.splitlines() if "::" in line]
    return {name for node in nodes for name in (node, node.split("[")[0], node.split("::")[0])}


def row(planted: Fault, result: Result) -> str:
    """One line of at most 80 columns."""
    by = result.detail.removeprefix("tests/test_").replace(".py::test_", ": ")
    shown = by if result.status == "noticed" else f"{result.status.upper()} {by}".rstrip()
    line = f"{planted.name:<16}{planted.what:<37} {shown}"
    return line if len(line) <= 80 else line[:79] + "~"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="FAULT", default=[], help="try these faults only")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="faults at once (default 2)")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
                        help="for one fault; a hang counts as noticed (default 600)")
    parser.add_argument("--all-tests", action="store_true",
                        help="run the whole suite for a fault that its tests did not notice")
    parser.add_argument("--list", action="store_true", help="print the faults with their tests and end")
    args = parser.parse_args()
    names = [each.name for each in FAULTS]
    if unknown := set(args.only) - set(names):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; --list prints the names")
    assert len(set(names)) == len(names), "two faults have the same name"
    chosen = [each for each in FAULTS if not args.only or each.name in args.only]
    if args.list:
        for each in chosen:
            print(f"{each.name:<16}{each.what:<37} {' '.join(each.tests)}")
        return 0
    tests = sorted({test for each in chosen for test in each.tests})
    known = known_tests(tests)
    status, printed = pytest(ROOT, [test for test in tests if test in known], 3600)
    if status != 0:
        sys.exit(f"error: without a fault these must pass:\n{printed}")

    def work(planted: Fault) -> Result:
        result = try_fault(planted, known, args.timeout, args.all_tests)
        print(f"{result.seconds:4.0f} s  {planted.name}: {result.status} {result.detail}", file=sys.stderr,
              flush=True)
        return result

    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(work, chosen))
    print(f"\n{'fault':<16}{'what it does':<37} noticed by")
    for planted, result in zip(chosen, results):
        print(row(planted, result))
    good = sum(result.fine for result in results)
    print(f"\n{good} of {len(results)} noticed")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
