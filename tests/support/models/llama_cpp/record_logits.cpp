// Records llama.cpp's float32 logits of every token, with keys and values in float32. The first tokens are one batch,
// each later token is a batch of its own.
// record_logits MODEL CONTEXT FIRST < token ids > logits
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) return 1;
  std::vector<llama_token> tokens;
  for (int token; scanf("%d", &token) == 1;) tokens.push_back(token);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(atoi(argv[2]));
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.n_threads = params.n_threads_batch = 1;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.swa_full = true;
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) return 1;
  const size_t words = static_cast<size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model)));
  llama_batch batch = llama_batch_init(static_cast<int32_t>(tokens.size()), 0, 1);
  for (size_t done = 0; done < tokens.size(); done += static_cast<size_t>(batch.n_tokens)) {
    batch.n_tokens = done == 0 ? atoi(argv[3]) : 1;
    for (int i = 0; i < batch.n_tokens; i++) {
      const size_t at = done + static_cast<size_t>(i);
      batch.token[i] = tokens[at];
      batch.pos[i] = static_cast<llama_pos>(at);
      batch.n_seq_id[i] = batch.logits[i] = 1;
      batch.seq_id[i][0] = 0;
    }
    if (llama_decode(context, batch) != 0) return 1;
    for (int i = 0; i < batch.n_tokens; i++) fwrite(llama_get_logits_ith(context, i), sizeof(float), words, stdout);
  }
}
