/* Powers of two of 16 numbers, for the instruction set EXP_TARGET, which has AVX-512. */
static const float LOG2_E = 1.44269504f;

/* 2^x, off by 3e-6 of it at most; exact for whole x. -inf gives 0 and inf itself, though `rest` is NaN there: the last
 * instruction looks at `whole`. */
EXP_TARGET INLINE __m512 exp2_of(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(9.58285302e-03f), rest, _mm512_set1_ps(5.59064247e-02f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.40240986e-01f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.93124193e-01f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

